"""The seam's products for the tokens of a decode step as one kernel each (`csrc/batch_linear/`). Checks, allocation and
launch.

Every function raises UserError naming the tensor and the shape expected, and KernelBuildError if the kernels cannot be
built. Tensors are contiguous bf16 on one CUDA device of compute capability 9.0.

The kernels read weights before the previous kernel has ended: an earlier one must have written them.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch

from llama3.ops import elementwise, one_kernel
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU, squares_argument
from llama3.ops.skinny_linear import NARROW

TOKEN_COUNTS = (32, 48, 64, 96, 128)  # that the kernels are compiled for; others run in the next larger one
MIN_TOKENS, MAX_TOKENS = 17, TOKEN_COUNTS[-1]  # up to 16, csrc/skinny_linear/ is faster
# With more tokens than this cuBLASLt is faster on GPUs of fast memory, and SwiGLU's tiles have 128 rows at most.
FAST_MEMORY_TOKENS = MAX_TALL_TOKENS = 64
TILE_ROWS, UNIT_ROWS = 128, 16
MIN_TILE_ROWS, MAX_TILE_ROWS = 64, 256
STAGE_COLUMNS = 64
EXCHANGE_BYTES = 100 << 10  # that could be read in the time that a cluster takes to exchange its sums
MIN_STEPS = 4  # of a block: room for what the others send
SPLITS = (1, 2, 4, 8)  # clusters of other sizes find fewer places
# Clusters, by their blocks, that an H200 runs at once if each block has a multiprocessor of its own.
CLUSTERS_AT_ONCE = {1: 132, 2: 66, 4: 30, 8: 14}
FULL = 0.9  # of the multiprocessors at work; more splits for the rest would cost more

# Two neighbours in the chain of kernels fit on a multiprocessor together. SwiGLU's product is long enough to be better
# off alone with a deeper ring, and with a still deeper one where every block has a multiprocessor of its own.
SHARED_BYTES, SWIGLU_BYTES, SWIGLU_ALONE_BYTES = 106 << 10, 150 << 10, 200 << 10
# With fast memory and long rows every block is better off alone; deeper rings than these have not been faster.
ONE_ROUND_BYTES = {LINEAR_ADD: 150 << 10, NORM_LINEAR: 170 << 10, NORM_SWIGLU: 200 << 10}
TRIGGER = 2
MAX_STAGES = 14
# Of a deep ring, where the block can only start when the previous kernel ends: x would have to wait behind the rest.
AHEAD = 2


class Plan(NamedTuple):
    """How a product runs: blocks of the cluster that makes a tile, among which the inner dimension is split; shared
    memory that a block may use; how many stages are left to ask for when the next kernel may start; weight rows of a
    tile; how many stages of weight are asked for before the previous kernel has ended, at most."""

    splits: int
    shared_bytes: int = SHARED_BYTES
    trigger: int = TRIGGER
    tile_rows: int = TILE_ROWS
    ahead: int = MAX_STAGES


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


def pays(num_tokens: int, num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run a product of this shape here, and are faster than cuBLASLt (docs/cuda-ops.md)."""
    if not MIN_TOKENS <= num_tokens <= MAX_TOKENS or not one_kernel.takes(num_rows, size, dtype, device):
        return False
    return num_tokens <= FAST_MEMORY_TOKENS or not one_kernel.has_fast_memory(device)


@functools.cache
def choose_plan(form: int, num_tokens: int, num_rows: int, size: int, num_sms: int, fast_memory: bool = False) -> Plan:
    """On GPUs of fast memory and for long rows, tiles as tall as it takes to have one for every multiprocessor; else
    the split whose busiest multiprocessor has the fewest bytes to read, of weights, x, and other blocks' sums."""
    tokens, steps = padded(num_tokens), size // STAGE_COLUMNS
    possible = [splits for splits in SPLITS if splits == 1 or splits * MIN_STEPS <= steps]
    if fast_memory and tokens <= MAX_TALL_TOKENS and min(num_rows, size) > NARROW:
        return _one_round(form, tokens, num_rows, possible)
    tiles = -(-num_rows // TILE_ROWS)

    def cost(splits: int) -> float:
        blocks = max(1.0, tiles * splits / num_sms)  # two fit on a multiprocessor, so they need not come in rounds
        read = -(-steps // splits) * (TILE_ROWS + tokens) * STAGE_COLUMNS * 2
        return blocks * (read + (splits > 1) * (sent_bytes(tokens, splits) + EXCHANGE_BYTES))

    splits = min(possible, key=cost)
    alone = tiles * splits <= num_sms
    if form != NORM_SWIGLU or (alone and fast_memory):
        return Plan(splits)
    return Plan(splits, SWIGLU_ALONE_BYTES if alone else SWIGLU_BYTES)


def _one_round(form: int, tokens: int, num_rows: int, possible: list[int]) -> Plan:
    heights = {splits: one_round_rows(form, num_rows, tokens, splits) for splits in possible}
    blocks = {splits: -(-num_rows // rows) * splits for splits, rows in heights.items()}
    most = CLUSTERS_AT_ONCE[1]
    splits = next((s for s in possible if FULL * most <= blocks[s] <= most), None)
    if splits is None:
        splits = max((s for s in possible if blocks[s] <= most), key=blocks.__getitem__, default=1)
    # The kernel before down is so long that its last blocks leave the first of down's time to fill their rings.
    ahead = MAX_STAGES if form == LINEAR_ADD else AHEAD
    return Plan(splits, ONE_ROUND_BYTES[form], 0, heights[splits], ahead)


def one_round_rows(form: int, num_rows: int, num_tokens: int, splits: int) -> int:
    """Rows of a tile with which an H200 makes all tiles at once, or the nearest that a tile can have."""
    units = -(-num_rows // CLUSTERS_AT_ONCE[splits] // UNIT_ROWS)
    return min(max(units * UNIT_ROWS, MIN_TILE_ROWS), max_tile_rows(form, num_tokens))


def max_tile_rows(form: int, num_tokens: int) -> int:
    """Only SwiGLU's products have so many rows that taller tiles than TILE_ROWS pay."""
    return MAX_TILE_ROWS if form == NORM_SWIGLU and padded(num_tokens) <= MAX_TALL_TOKENS else TILE_ROWS


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


def _normed(
    op: str, x: torch.Tensor, weight: torch.Tensor, eps: float, squares: torch.Tensor | None, plan: Plan | None
) -> torch.Tensor:
    out, arguments = one_kernel.arguments(op, x, weight, None, eps, None)
    squares = elementwise.sum_squares(x) if squares is None else squares
    _launch(arguments | squares_argument(op, squares, x), x.device, plan)
    return out


def _launch(arguments: dict[str, Any], device: torch.device, plan: Plan | None) -> None:
    shape = (arguments[name] for name in ("form", "num_tokens", "num_rows", "size"))
    plan = plan or choose_plan(*shape, one_kernel.num_sms(device), one_kernel.has_fast_memory(device))
    library().product(**arguments, **plan._asdict())
