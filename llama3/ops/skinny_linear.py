"""The seam's products for few tokens as one kernel each (`csrc/skinny_linear/`). Checks, allocation and launch.

Every function raises UserError naming the tensor and the shape expected, and KernelBuildError if the kernels cannot be
built. Tensors are contiguous bf16 on one CUDA device of compute capability 9.0.

The kernels read weights before the previous kernel has ended: an earlier one must have written them.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from llama3.ops import one_kernel

MAX_TOKENS = 32
ALWAYS_TOKENS = 16  # up to which these kernels are the fastest for every shape
# Beyond, csrc/batch_linear/ is faster for fewer rows or columns than this, or as many, and with fast memory always.
NARROW = 2048
MAX_TILE_ROWS = 128


class Tiling(NamedTuple):
    """Rows of weight that one cluster of blocks makes, and its blocks, among which the inner dimension is split."""

    tile_rows: int
    splits: int


def norm_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    squares: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """RMSNorm of x [T, K], then times weight [N, K] -> [T, N]. The `squares` of so few tokens are summed on the way, so
    those given are not needed. `tiling`: None leaves the choice to choose_tiling."""
    return _product("norm_linear", x, weight, None, eps, None, tiling)


def norm_swiglu(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    eps: float,
    squares: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """RMSNorm of x [T, K], then silu(gate) * up of its product with gate_up [2 F, K] -> [T, F]."""
    return _product("norm_swiglu", x, gate_up, None, eps, None, tiling)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    tiling: Tiling | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual [T, N] + x [T, K] times weight [N, K] -> [T, N], in `out` if given, which may be the residual."""
    return _product("linear_add", x, weight, residual, 0.0, out, tiling)


def linear_add_squares(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """linear_add; sums of squares would be of no use."""
    return linear_add(x, weight, residual), None


def pays(num_tokens: int, num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run a product of this shape here, and are the fastest (docs/cuda-ops.md)."""
    if not 1 <= num_tokens <= MAX_TOKENS or not one_kernel.takes(num_rows, size, dtype, device):
        return False
    return num_tokens <= ALWAYS_TOKENS or (min(num_rows, size) > NARROW and not one_kernel.has_fast_memory(device))


def min_tile_rows(num_tokens: int) -> int:
    """The fewest rows of a tile for so many tokens; with fewer, x would outweigh the weights."""
    return 16 if num_tokens <= 16 else 48


@functools.cache
def choose_tiling(num_tokens: int, num_rows: int, size: int, num_sms: int) -> Tiling:
    """The tiling whose busiest multiprocessor has the fewest bytes of weight and x to read, with what was measured.

    Clusters of four find fewer places than their blocks would alone. Two blocks of one kernel on a multiprocessor keep
    more requests under way, which pays in long products and costs the next kernel its place in short ones. With more
    than 16 tokens it is arithmetic that takes long: a tile costs what its warps could have multiplied, and the second
    block pays sooner.
    """
    few = num_tokens <= 16
    padded = max(8, 1 << (num_tokens - 1).bit_length())

    def cost(tiling: Tiling) -> tuple[float, float]:
        blocks = -(-num_rows // tiling.tile_rows) * tiling.splits
        rounds = -(-blocks // num_sms)
        rows = tiling.tile_rows if few else 64 if tiling.tile_rows <= 64 else MAX_TILE_ROWS
        block_bytes = (rows + padded) * size / tiling.splits * 2
        is_long = block_bytes >= (400e3 if few or tiling.splits == 1 else 250e3)
        deep = (0.8 if few else 0.7) if rounds == 2 and is_long else 1.0
        crowded = (1.15 if few else 1.25) if tiling.splits == 4 else 1.0
        return rounds * block_bytes * deep * crowded, rounds * (tiling.tile_rows + padded) * size / tiling.splits

    rows = range(MAX_TILE_ROWS, min_tile_rows(num_tokens) - 1, -16)
    fills_alone = num_rows >= 0.9 * num_sms * MAX_TILE_ROWS
    splits = [s for s in (1, 2, 4) if s == 1 or (s * 256 <= size and not fills_alone)]
    tilings = (Tiling(r, s) for s in splits for r in rows if r >= 16 * s)
    return min(tilings, key=cost)


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
    tiling: Tiling | None,
) -> torch.Tensor:
    out, arguments = one_kernel.arguments(op, x, weight, residual, eps, out)
    tiling = tiling or choose_tiling(*x.shape[:1], *weight.shape, one_kernel.num_sms(x.device))
    library().product(**arguments, tile_rows=tiling.tile_rows, splits=tiling.splits)
    return out
