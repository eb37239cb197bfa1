"""Shared set-up: tests that need a GPU are skipped where there is none, and torch keeps to the cores that there are."""

import os

import pytest
import torch

# Two cores share one test process well; more threads than cores make small matrix products slower.
torch.set_num_threads(min(os.cpu_count() or 1, 4))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
