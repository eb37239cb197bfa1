"""Shared set-up: tests are skipped where the GPU or compiler that they need is missing; torch keeps to one thread."""

from collections.abc import Iterator

import pytest
import torch

import load_custom_kernels
from llama3.device import is_hopper

# One thread: matrices this small gain nothing from more, and lose much where other processes want the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "nvcc": "needs the CUDA compiler" if load_custom_kernels.compiler_problem() else None,
    }
    for item in items:
        for mark, reason in missing.items():
            if reason and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def poisoned_allocations() -> Iterator[None]:
    """Fresh memory is NaN, so that what an op or a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def needs_hopper() -> None:
    if not is_hopper(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs a GPU of compute capability 9.0")
