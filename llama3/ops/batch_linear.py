"""The seam's products for the tokens of a decode step as one kernel each (`csrc/batch_linear/`). Checks, allocation and
launch.

Every function raises UserError naming the tensor and the shape expected, and KernelBuildError if the kernels cannot be
built. Tensors are contiguous bf16 on one CUDA device of compute capability 9.0.

The kernels read weights and norms before the previous kernel has ended: an earlier one must have written them.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from llama3.ops import one_kernel
from llama3.ops.one_kernel import FORMS, NORM_SWIGLU
from llama3.ops.skinny_linear import NARROW

TOKEN_COUNTS = (32, 48, 64, 96, 128)  # that the kernels are compiled for; others run in the next larger one
MIN_TOKENS, MAX_TOKENS = 17, TOKEN_COUNTS[-1]  # up to 16, csrc/skinny_linear/ is faster
# On GPUs of more memory, which is faster memory as well, cuBLASLt is faster for many tokens and for long rows.
FAST_MEMORY_BYTES, FAST_MEMORY_TOKENS = 100 << 30, 64
TILE_ROWS, UNIT_ROWS = 128, 16
STAGE_COLUMNS = 64
EXCHANGE_BYTES = 100 << 10  # that could be read in the time that a cluster takes to exchange its sums
MIN_STEPS = 4  # of a block: room for what the others send
SPLITS = (1, 2, 4, 8)  # clusters of other sizes find fewer places

# Two neighbours in the chain of kernels fit on a multiprocessor together. SwiGLU's product is long enough to be better
# off alone with a deeper ring, and with a still deeper one where every block has a multiprocessor of its own.
SHARED_BYTES, SWIGLU_BYTES, SWIGLU_ALONE_BYTES = 106 << 10, 150 << 10, 200 << 10
TRIGGER = 2


class Plan(NamedTuple):
    """How a product runs: blocks of the cluster that makes 128 rows, among which the inner dimension is split; shared
    memory that a block may use; how many stages are left to ask for when the next kernel may start."""

    splits: int
    shared_bytes: int = SHARED_BYTES
    trigger: int = TRIGGER


def norm_linear(
    x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, eps: float, plan: Plan | None = None
) -> torch.Tensor:
    """RMSNorm of x [T, K], then times weight [N, K] -> [T, N]. `plan`: None leaves the choice to choose_plan."""
    return _product("norm_linear", x, weight, norm, None, eps, None, plan)


def norm_swiglu(
    x: torch.Tensor, norm: torch.Tensor, gate_up: torch.Tensor, eps: float, plan: Plan | None = None
) -> torch.Tensor:
    """RMSNorm of x [T, K], then silu(gate) * up of its product with gate_up [2 F, K] -> [T, F]."""
    return _product("norm_swiglu", x, gate_up, norm, None, eps, None, plan)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    plan: Plan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual [T, N] + x [T, K] times weight [N, K] -> [T, N], in `out` if given, which may be the residual."""
    return _product("linear_add", x, weight, None, residual, 0.0, out, plan)


def pays(num_tokens: int, num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run a product of this shape here, and are faster than cuBLASLt (docs/cuda-ops.md)."""
    if not MIN_TOKENS <= num_tokens <= MAX_TOKENS or not one_kernel.takes(num_rows, size, dtype, device):
        return False
    return not _has_fast_memory(device) or (num_tokens <= FAST_MEMORY_TOKENS and min(num_rows, size) <= NARROW)


@functools.cache
def choose_plan(form: int, num_tokens: int, num_rows: int, size: int, num_sms: int) -> Plan:
    """The split whose busiest multiprocessor has the fewest bytes to read, of weights, x, and other blocks' sums."""
    tokens = padded(num_tokens)
    tiles, steps = -(-num_rows // TILE_ROWS), size // STAGE_COLUMNS

    def cost(splits: int) -> float:
        blocks = max(1.0, tiles * splits / num_sms)  # two fit on a multiprocessor, so they need not come in rounds
        read = -(-steps // splits) * (TILE_ROWS + tokens) * STAGE_COLUMNS * 2
        return blocks * (read + (splits > 1) * (sent_bytes(tokens, splits) + EXCHANGE_BYTES))

    splits = min((s for s in SPLITS if s == 1 or s * MIN_STEPS <= steps), key=cost)
    if form != NORM_SWIGLU:
        return Plan(splits)
    return Plan(splits, SWIGLU_ALONE_BYTES if tiles * splits <= num_sms else SWIGLU_BYTES)


def padded(num_tokens: int) -> int:
    """The token count of the kernel that runs `num_tokens`."""
    return next(count for count in TOKEN_COUNTS if count >= num_tokens)


def sent_bytes(tokens: int, splits: int) -> int:
    """What the blocks of a cluster send the one that finishes most of their tile."""
    return splits * -(-TILE_ROWS // UNIT_ROWS // splits) * UNIT_ROWS * tokens * 4


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("batch_linear")


@functools.cache
def _has_fast_memory(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).total_memory > FAST_MEMORY_BYTES


def _product(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    plan: Plan | None,
) -> torch.Tensor:
    out, arguments = one_kernel.arguments(op, x, weight, norm, residual, eps, out)
    plan = plan or choose_plan(FORMS[op], *x.shape[:1], *weight.shape, one_kernel.num_sms(x.device))
    library().product(**arguments, **plan._asdict())
    return out
