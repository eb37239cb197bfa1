"""The errors for tensors that a kernel would misread."""

import torch

from llama3.errors import UserError


def wrong_tensor(op: str, name: str, tensor: torch.Tensor, expected: str) -> UserError:
    """Says what `name` is and what `op` expects in its place."""
    found = f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
    return UserError(f"{op}: {name} is {found}; expected {expected}")


def check_tensors(
    op: str, device: torch.device, dtype: torch.dtype, **expected: tuple[torch.Tensor, tuple[int, ...]]
) -> None:
    """UserError unless each tensor is contiguous, of `dtype` and its shape, and on `device`, which is a GPU."""
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise wrong_tensor(op, name, tensor, f"contiguous {dtype} {list(shape)}")
    for name, (tensor, _) in expected.items():
        if not tensor.is_cuda or tensor.device != device:
            raise UserError(f"{op}: {name} is on {tensor.device}; expected a CUDA device, the same for every tensor")
