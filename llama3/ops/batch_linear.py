"""The seam's products for the tokens of a decode step as one kernel each (`csrc/batch_linear/`). Checks, allocation and
launch.

Every function raises UserError naming the tensor and the shape expected, and KernelBuildError if the kernels cannot be
built. Tensors are contiguous bf16 on one CUDA device of compute capability 9.0.

The kernels read weights before the previous kernel has ended: an earlier one must have written them.
"""

import functools
from types import ModuleType
from typing import Any

import torch

from llama3.ops import elementwise, one_kernel, skinny_linear
from llama3.ops.batch_plans import TOKEN_COUNTS, UNIT_ROWS, Plan, choose_plan
from llama3.ops.one_kernel import squares_argument

# With fewer tokens csrc/skinny_linear/ is always faster; but not at the head.
MIN_TOKENS, MAX_TOKENS = 1 + min(map(min, skinny_linear.MOST_TOKENS.values())), TOKEN_COUNTS[-1]
FAST_MEMORY_TOKENS = 64  # with more, cuBLASLt is faster on GPUs of fast memory


def norm_linear(
    x: torch.Tensor, weight: torch.Tensor, eps: float, squares: torch.Tensor | None = None, plan: Plan | None = None
) -> torch.Tensor:
    """RMSNorm of x [T, K], then times weight [N, K] -> [T, N].

    squares: sums of those of x, fp32 [P, T]; None: one more kernel sums them. plan: None leaves it to choose_plan.
    """
    return _normed("norm_linear", x, weight, eps, squares, plan)


def norm_swiglu(
    x: torch.Tensor, gate_up: torch.Tensor, eps: float, squares: torch.Tensor | None = None, plan: Plan | None = None
) -> torch.Tensor:
    """RMSNorm of x [T, K], then silu(gate) * up of its product with gate_up [2 F, K] -> [T, F]."""
    return _normed("norm_swiglu", x, gate_up, eps, squares, plan)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    plan: Plan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual [T, N] + x [T, K] times weight [N, K] -> [T, N], in `out` if given, which may be the residual."""
    out, arguments = one_kernel.arguments("linear_add", x, weight, residual, 0.0, out)
    _launch(arguments | squares_argument("linear_add", None, x), x.device, plan)
    return out


def linear_add_squares(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, plan: Plan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """linear_add, and sums of the squares of its result, fp32 [N / 16, T]."""
    op = "linear_add"
    out, arguments = one_kernel.arguments(op, x, weight, residual, 0.0, None)
    squares = out.new_empty((out.shape[1] // UNIT_ROWS, out.shape[0]), dtype=torch.float32)
    _launch(arguments | squares_argument(op, squares, x), x.device, plan)
    return out, squares


def linear(x: torch.Tensor, weight: torch.Tensor, plan: Plan | None = None) -> torch.Tensor:
    """x [T, K] times weight [N, K] -> [T, N], for weights of so many rows that every block makes several tiles."""
    out, arguments = one_kernel.arguments("linear", x, weight, None, 0.0, None)
    _launch(arguments | squares_argument("linear", None, x), x.device, plan)
    return out


def pays(num_tokens: int, num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run a product of this shape here, and are the fastest (docs/cuda-ops.md)."""
    if not one_kernel.takes(num_rows, size, dtype, device):
        return False
    fast_memory = one_kernel.has_fast_memory(device)
    most = FAST_MEMORY_TOKENS if fast_memory else MAX_TOKENS
    return skinny_linear.most_tokens(min(num_rows, size), fast_memory) < num_tokens <= most


def pays_at_head(num_tokens: int, num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `linear` can run the head's product here, and is faster than cuBLASLt."""
    if num_tokens > FAST_MEMORY_TOKENS or not one_kernel.is_head(num_rows, size):
        return False
    return one_kernel.runs(num_rows, size, dtype, device) and one_kernel.has_fast_memory(device)


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("batch_linear")


def _normed(
    op: str, x: torch.Tensor, weight: torch.Tensor, eps: float, squares: torch.Tensor | None, plan: Plan | None
) -> torch.Tensor:
    out, arguments = one_kernel.arguments(op, x, weight, None, eps, None)
    squares = elementwise.sum_squares(x) if squares is None else squares
    _launch(arguments | squares_argument(op, squares, x), x.device, plan)
    return out


def _launch(arguments: dict[str, Any], device: torch.device, plan: Plan | None) -> None:
    library().product(**one_kernel.with_plan(arguments, plan, choose_plan, device))
