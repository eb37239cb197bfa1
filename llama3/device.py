"""Which device and dtype to run with, from what the caller asked for; and host values on their way to a device."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from llama3.config import SUPPORTED_DTYPES, ModelConfig
from llama3.errors import DeviceError


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is the GPU if there is one. Raises DeviceError, saying why, for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device {device!r} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if resolved.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {str(resolved)!r} is not supported; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            reason = "PyTorch finds no usable NVIDIA GPU" if torch.version.cuda else "this PyTorch is built for CPUs"
            raise DeviceError(f"device {str(resolved)!r} is not available: {reason}")
        if (resolved.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"device {str(resolved)!r} does not exist: there are {torch.cuda.device_count()} GPUs")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    """ "auto" is the dtype of the folder."""
    if dtype == "auto":
        return config.dtype
    resolved = SUPPORTED_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in SUPPORTED_DTYPES.values():
        raise DeviceError(f"dtype {dtype!r} is unknown; use 'auto' or one of {', '.join(SUPPORTED_DTYPES)}")
    return resolved


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether kernels for compute capability 9.0 alone run on this device: wgmma, the tensor copy engine, clusters."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """While it is entered, streams, events, graphs and kernels that name no GPU are this one's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host numbers as a tensor on `device`, without waiting for what the device still has to do."""
    tensor = torch.as_tensor(values, dtype=dtype)
    # Only from pinned memory is the copy enqueued; from pageable memory the host waits for its turn.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
