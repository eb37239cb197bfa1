"""The error for a tensor that a kernel would misread."""

import torch

from llama3.errors import UserError


def wrong_tensor(op: str, name: str, tensor: torch.Tensor, expected: str) -> UserError:
    """Says what `name` is and what `op` expects in its place."""
    found = f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
    return UserError(f"{op}: {name} is {found}; expected {expected}")
