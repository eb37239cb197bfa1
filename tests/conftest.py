"""Shared set-up: tests are skipped where the GPU or compiler that they need is missing; torch keeps to one thread."""

import pytest
import torch

import load_custom_kernels

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
