"""Shared set-up: tests that need a GPU are skipped where there is none, and torch keeps to one thread."""

import pytest
import torch

# One thread: matrices this small gain nothing from more, and lose much where other processes want the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
