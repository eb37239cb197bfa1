"""The matrix products of decode for few tokens, each one kernel of `csrc/linear/`: norm, product and epilogue together.

They run on compute capability 9.0 in bf16. weight and norm_weight are read before the previous kernel on the stream has
ended: a kernel that writes them must not be the one launched just before.

Every function raises UserError naming the tensor and the shape expected, and KernelBuildError if the kernels cannot be
built. `wish` says how the work is cut: rows of a tile, splits of the inner dimension, tiles that share their x; 0
leaves a choice to the kernel's host side. It is for measuring.
"""

import functools
from types import ModuleType

import torch

from llama3.errors import UserError

MAX_TOKENS = 128
STORE, ADD, SWIGLU = 0, 1, 2  # the numbers of linear::Epilogue
Wish = tuple[int, int, int]
ANY: Wish = (0, 0, 0)


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("linear")


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels' instructions exist on this device (compute capability 9.0 only)."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels take x [T, K] times weight [N, K]: few tokens, bf16, whole chunks and groups of rows."""
    few = x.shape[0] <= MAX_TOKENS and x.dtype == torch.bfloat16
    return few and weight.shape[0] % 16 == 0 and weight.shape[1] % 8 == 0 and runs_on(x.device)


def norm_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float, wish: Wish = ANY
) -> torch.Tensor:
    """RMSNorm of x [T, K], then times weight [N, K] -> [T, N]."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    _run("norm_linear", x, weight, norm_weight, None, out, eps, STORE, wish)
    return out


def norm_swiglu(
    x: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float, wish: Wish = ANY
) -> torch.Tensor:
    """RMSNorm of x [T, K], then silu(gate) * up of its product with the packed weight [2 F, K] -> [T, F]."""
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    _run("norm_swiglu", x, weight, norm_weight, None, out, eps, SWIGLU, wish)
    return out


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, wish: Wish = ANY) -> torch.Tensor:
    """residual [T, N] + x [T, K] times weight [N, K] -> [T, N]; the sum is rounded once."""
    out = torch.empty_like(residual)
    _run("linear_add", x, weight, None, residual, out, 0.0, ADD, wish)
    return out


def _run(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    epilogue: int,
    wish: Wish,
) -> None:
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_TOKENS:
        raise _wrong(op, "x", x, f"[T, K] with 1 to {MAX_TOKENS} tokens")
    num_tokens, size = x.shape
    num_rows = weight.shape[0]
    expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
        "x": (x, (num_tokens, size)),
        "weight": (weight, (num_rows, size)),
        "norm_weight": (norm_weight, (size,)),
        "residual": (residual, (num_tokens, num_rows)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != torch.bfloat16 or not tensor.is_contiguous():
            raise _wrong(op, name, tensor, f"contiguous bfloat16 {list(shape)}")
        if not tensor.is_cuda or tensor.device != x.device:
            raise UserError(f"{op}: {name} is on {tensor.device}; expected a CUDA device, the same for every tensor")
    pointers = (0 if t is None else t.data_ptr() for t in (x, weight, norm_weight, residual, out))
    stream = torch.cuda.current_stream(x.device).cuda_stream
    library().skinny(*pointers, num_tokens, num_rows, size, eps, epilogue, wish, True, stream)


def _wrong(op: str, name: str, tensor: torch.Tensor, expected: str) -> UserError:
    found = f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
    return UserError(f"{op}: {name} is {found}; expected {expected}")
