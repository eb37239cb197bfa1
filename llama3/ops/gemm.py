"""Matrix products of many tokens on Hopper's tensor cores, with what follows them fused: `csrc/gemm/`.

Every function raises UserError naming the tensor and the shape expected, and KernelBuildError if the kernels cannot be
built. Tensors are contiguous, 16-byte aligned, bf16 or fp16 on one CUDA device of compute capability 9.0.
"""

import functools
from types import ModuleType

import torch

from llama3.device import is_hopper
from llama3.errors import UserError
from llama3.ops.elementwise import DTYPES
from llama3.ops.tensor_error import wrong_tensor

PLAIN, RESIDUAL, SWIGLU = range(3)  # the numbers of gemm::Epilogue
TILE = 256  # tokens and weight rows of a tile of two multiprocessors
BLOCK_TOKENS = TILE // 2
MIN_OCCUPANCY = 0.85  # with more of the GPU idle in the last round of tiles, cuBLASLt's smaller tiles win


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("gemm")


def suits(device: torch.device, num_tokens: int, num_rows: int, size: int) -> bool:
    """Whether x [num_tokens, size] times weight [num_rows, size] can run here, and keeps the device busy to its end."""
    if not is_hopper(device) or num_rows % 8 or size % 8:
        return False
    tiles = -(-num_tokens // TILE) * -(-num_rows // TILE)
    at_once = torch.cuda.get_device_properties(device).multi_processor_count // 2
    # Tokens that only pad the last tile are idle time as well.
    busy = num_tokens * num_rows / TILE**2 / (-(-tiles // at_once) * at_once)
    return busy >= MIN_OCCUPANCY


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] times weight [N, K], plus residual [T, N] if there is one -> [T, N]; summed in fp32, rounded once."""
    _check_operands("product", x, weight, 8)
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    if residual is not None and residual.shape != out.shape:
        raise wrong_tensor("product", "residual", residual, f"contiguous {x.dtype} {list(out.shape)}")
    return _launch("product", PLAIN if residual is None else RESIDUAL, x, weight, out, residual)


def swiglu(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(x gate) * (x up), x [T, K], gate_up [2 F, K] in groups of 8 gate rows and their 8 up rows -> [T, F]."""
    _check_operands("swiglu", x, gate_up, 16)
    return _launch("swiglu", SWIGLU, x, gate_up, x.new_empty(x.shape[0], gate_up.shape[0] // 2), None)


def _check_operands(op: str, x: torch.Tensor, weight: torch.Tensor, unit: int) -> None:
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] < 8 or x.shape[1] % 8:
        raise wrong_tensor(op, "x", x, "[T, K] with K a multiple of 8")
    if weight.dim() != 2 or weight.shape[0] < unit or weight.shape[0] % unit or weight.shape[1] != x.shape[1]:
        raise wrong_tensor(op, "weight", weight, f"[N, {x.shape[1]}] with N a multiple of {unit}")
    if x.dtype not in DTYPES:
        raise UserError(f"{op}: the kernels compute in bfloat16 or float16, not in {x.dtype}")


def _launch(
    op: str,
    epilogue: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    for name, tensor in (("x", x), ("weight", weight), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise wrong_tensor(op, name, tensor, f"contiguous {x.dtype}, 16-byte aligned")
        if not is_hopper(tensor.device) or tensor.device != x.device:
            raise UserError(f"{op}: {name} is on {tensor.device}; expected a Hopper GPU, the same for every tensor")
    operands = (x.data_ptr(), weight.data_ptr(), 0 if residual is None else residual.data_ptr(), out.data_ptr())
    sizes = (x.shape[0], weight.shape[0], x.shape[1])
    stream = torch.cuda.current_stream(x.device).cuda_stream
    library().gemm(*operands, *sizes, epilogue, DTYPES[x.dtype], stream=stream)
    return out
