"""The seam's products for few tokens as one kernel each (`csrc/skinny_linear/`). Checks, allocation and launch.

Every function raises UserError naming the tensor and the shape expected, and KernelBuildError if the kernels cannot be
built. Tensors are contiguous bf16 on one CUDA device of compute capability 9.0.

The kernels read weights before the previous kernel has ended: an earlier one must have written them.
"""

import functools
from types import ModuleType

import torch

from llama3.ops import one_kernel
from llama3.ops.skinny_plans import Plan, choose_plan

NARROW = 2048  # rows or columns: with so many or fewer csrc/batch_linear/ is faster for fewer tokens than else
# Up to which these kernels are the fastest, without fast memory and with it.
MOST_TOKENS = {"narrow": (16, 8), "wide": (32, 16)}


def norm_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    squares: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """RMSNorm of x [T, K], then times weight [N, K] -> [T, N]. The `squares` of so few tokens are summed on the way, so
    those given are not needed. `plan`: None leaves it to choose_plan."""
    return _product("norm_linear", x, weight, None, eps, None, plan)


def norm_swiglu(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    eps: float,
    squares: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """RMSNorm of x [T, K], then silu(gate) * up of its product with gate_up [2 F, K] -> [T, F]."""
    return _product("norm_swiglu", x, gate_up, None, eps, None, plan)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    plan: Plan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual [T, N] + x [T, K] times weight [N, K] -> [T, N], in `out` if given, which may be the residual."""
    return _product("linear_add", x, weight, residual, 0.0, out, plan)


def linear_add_squares(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """linear_add; sums of squares would be of no use."""
    return linear_add(x, weight, residual), None


def pays(num_tokens: int, num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run a product of this shape here, and are the fastest (docs/cuda-ops.md)."""
    if not one_kernel.takes(num_rows, size, dtype, device):
        return False
    return 1 <= num_tokens <= most_tokens(min(num_rows, size), one_kernel.has_fast_memory(device))


def most_tokens(width: int, fast_memory: bool) -> int:
    """Up to how many tokens these kernels are the fastest for products of `width` rows or columns, if not more."""
    return MOST_TOKENS["narrow" if width <= NARROW else "wide"][fast_memory]


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("skinny_linear")


def _product(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    plan: Plan | None,
) -> torch.Tensor:
    out, arguments = one_kernel.arguments(op, x, weight, residual, eps, out)
    library().product(**one_kernel.with_plan(arguments, plan, choose_plan, x.device))
    return out
