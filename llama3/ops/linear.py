"""The matrix products of the CUDA ops (docs/cuda-ops.md has the measurements).

For the tokens of a decode step one kernel an op, for many on Hopper a kernel with SwiGLU fused, each where it is
faster; else cuBLASLt between elementwise kernels.
"""

from types import ModuleType

import torch

from llama3.errors import UserError
from llama3.ops import batch_linear, elementwise, gemm, gemm_search, skinny_linear
from llama3.ops.cublaslt import ALIGNMENT, Product

# From here on products alone are as fast in csrc/gemm/ as in cuBLASLt, or faster; SwiGLU, which saves a pass, sooner.
LARGE_MIN_TOKENS = 4096

ONE_KERNEL: tuple[ModuleType, ...] = (skinny_linear, batch_linear)  # families that run a whole op, few tokens first

_products: dict[Product, Product] = {}


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm of x [T, K], then times weight [N, K] -> [T, N]. With `squares` of x the norm need not be a kernel."""
    if norm_weight is None and (one_kernel := _one_kernel(x, weight)):
        return one_kernel.norm_linear(x, weight, eps, squares)
    return product(elementwise.rms_norm(x, norm_weight, eps), weight)


def norm_swiglu(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    gate_up: torch.Tensor,
    eps: float,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm of x [T, K], then silu(gate) * up of its product with gate_up [2 F, K] -> [T, F]."""
    if norm_weight is None and (one_kernel := _one_kernel(x, gate_up)):
        return one_kernel.norm_swiglu(x, gate_up, eps, squares)
    normed = elementwise.rms_norm(x, norm_weight, eps)

    def apart(weight: torch.Tensor) -> torch.Tensor:
        return elementwise.silu_mul(product(normed, weight))

    plan = gemm_search.swiglu_plan(normed, gate_up, apart) if gate_up.dim() == 2 else None
    return apart(gate_up) if plan is None else gemm.swiglu(normed, gate_up, plan)


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """residual [T, N] + x [T, K] times weight [N, K] -> [T, N]; the sum is rounded once, the residual is not copied."""
    if one_kernel := _one_kernel(x, weight, residual):
        return one_kernel.linear_add(x, weight, residual)
    return product(x, weight, residual)


def linear_add_squares(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """linear_add, and sums of the squares of its result, fp32 [P, T], where the norm that follows gains by them."""
    if one_kernel := _one_kernel(x, weight, residual):
        return one_kernel.linear_add_squares(x, weight, residual)
    return product(x, weight, residual), None


def _one_kernel(*operands: torch.Tensor) -> ModuleType | None:
    """The family of kernels that runs a whole op on x, its weight and perhaps a residual, and is the fastest there."""
    # They read matrices, contiguous and aligned.
    if not all(t.dim() == 2 and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in operands):
        return None
    x, weight = operands[:2]
    shape = (x.shape[0], *weight.shape, x.dtype, x.device)
    return next((family for family in ONE_KERNEL if family.pays(*shape)), None)


def product(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None, *, allow_own: bool = True
) -> torch.Tensor:
    """x [T, K] times weight [N, K], plus residual [T, N] if there is one -> [T, N].

    allow_own: let csrc/gemm/ or csrc/batch_linear/ run it where that is faster than cuBLASLt.
    Raises UserError naming the tensor and the shape expected.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[0] < 1:
        raise UserError(f"product: x is {list(x.shape)} and weight {list(weight.shape)}; expected [T, K] and [N, K]")
    num_tokens, num_rows, size = x.shape[0], weight.shape[0], x.shape[1]
    _check("weight", weight, x, (num_rows, size))
    if residual is not None:
        _check("residual", residual, x, (num_tokens, num_rows))
        residual = _aligned(residual)
    x, given, weight = _aligned(x), weight, _aligned(weight)
    # It reads weights before the previous kernel has ended, which must not be one that copies them.
    fits_head = allow_own and residual is None and weight is given and batch_linear in ONE_KERNEL
    if fits_head and batch_linear.pays_at_head(num_tokens, num_rows, size, x.dtype, x.device):
        return batch_linear.linear(x, weight)
    if allow_own and num_tokens >= LARGE_MIN_TOKENS and gemm.suits(x.device, num_tokens, num_rows, size):
        return gemm.product(x, weight, residual)
    out = x.new_empty(num_tokens, num_rows)
    shape = Product(num_tokens, num_rows, size, x.dtype, x.device)
    shape = _products.setdefault(shape, shape)  # one object a shape: its descriptors are made once
    algorithm = gemm_search.algorithm_for(shape, x, weight, residual, out, allow_own)
    gemm_search.run(shape, algorithm, x, weight, residual, out)
    return out


def _check(name: str, tensor: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise UserError(f"product: {name} is {found}; expected {x.dtype} {list(shape)} on {x.device}")


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of one that is not as the algorithms expect: contiguous, from an aligned address on.

    Weights and what the ops themselves allocate always are.
    """
    is_aligned = tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
    return tensor if is_aligned else tensor.clone(memory_format=torch.contiguous_format)
