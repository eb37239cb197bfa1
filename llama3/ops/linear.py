"""The matrix products of the CUDA ops (docs/cuda-ops.md has the measurements).

For the tokens of a decode step one kernel an op, for many on Hopper a kernel with SwiGLU fused, each where it is
faster; else cuBLASLt between elementwise kernels.
"""

from types import ModuleType

import torch

from llama3.errors import UserError
from llama3.ops import batch_linear, elementwise, gemm, gemm_search, skinny_linear
from llama3.ops.cublaslt import ALIGNMENT, Product
from llama3.ops.norm_parts import NormParts

# From here on products alone are as fast in csrc/gemm/ as in cuBLASLt, or faster; SwiGLU, which saves a pass, sooner.
LARGE_MIN_TOKENS = 4096

ONE_KERNEL: tuple[ModuleType, ...] = (skinny_linear, batch_linear)  # families that run a whole op, few tokens first

_products: dict[Product, Product] = {}


def norm_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float, parts: NormParts | None = None
) -> torch.Tensor:
    """RMSNorm of x [T, K], then times weight [N, K] -> [T, N]. The norm's parts, if any, may take its place."""
    if one_kernel := _one_kernel(x, weight, norm_weight):
        return one_kernel.norm_linear(x, norm_weight, weight, eps, parts)
    return product(elementwise.rms_norm(x, norm_weight, eps), weight)


def norm_swiglu(
    x: torch.Tensor, norm_weight: torch.Tensor, gate_up: torch.Tensor, eps: float, parts: NormParts | None = None
) -> torch.Tensor:
    """RMSNorm of x [T, K], then silu(gate) * up of its product with gate_up [2 F, K] -> [T, F]."""
    if one_kernel := _one_kernel(x, gate_up, norm_weight):
        return one_kernel.norm_swiglu(x, norm_weight, gate_up, eps, parts)
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


def linear_add_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, next_norm: torch.Tensor
) -> tuple[torch.Tensor, NormParts | None]:
    """linear_add, and the parts of the RMSNorm of its result with weight next_norm [N], where those help."""
    if one_kernel := _one_kernel(x, weight, residual):
        return one_kernel.linear_add_norm(x, weight, residual, next_norm)
    return product(x, weight, residual), None


def _one_kernel(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> ModuleType | None:
    """The family of kernels that runs a whole op on these tensors, and is the fastest for their shapes."""
    if x.dim() != 2 or weight.dim() != 2:
        return None
    shape = (x.shape[0], *weight.shape, x.dtype, x.device)
    if not all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (x, weight, other)):
        return None
    return next((family for family in ONE_KERNEL if family.pays(*shape)), None)


def product(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None, *, allow_own: bool = True
) -> torch.Tensor:
    """x [T, K] times weight [N, K], plus residual [T, N] if there is one -> [T, N].

    allow_own: let csrc/gemm/ run it where that is faster than cuBLASLt.
    Raises UserError naming the tensor and the shape expected.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[0] < 1:
        raise UserError(f"product: x is {list(x.shape)} and weight {list(weight.shape)}; expected [T, K] and [N, K]")
    num_tokens, num_rows, size = x.shape[0], weight.shape[0], x.shape[1]
    _check("weight", weight, x, (num_rows, size))
    if residual is not None:
        _check("residual", residual, x, (num_tokens, num_rows))
        residual = _aligned(residual)
    x, weight = _aligned(x), _aligned(weight)
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
