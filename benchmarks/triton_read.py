"""A Triton kernel that only reads: the nearest to the memory's read bandwidth that needs no build step."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def _read(data, out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """Program p reads ROUNDS runs of BLOCK int32 that lie one after the other, and stores their sum at out[p]."""
    start = tl.program_id(0).to(tl.int64) * (ROUNDS * BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for i in tl.static_range(ROUNDS):
        total += tl.load(data + offsets + i * BLOCK, eviction_policy="evict_first")
    tl.store(out + tl.program_id(0), tl.sum(total))


def reader(data: torch.Tensor, block: int, rounds: int) -> Callable[[], object]:
    """A call that reads all of `data`, int32 with a multiple of block x rounds elements."""
    programs, rest = divmod(data.numel(), block * rounds)
    assert rest == 0, f"{data.numel()} elements are no multiple of {block} x {rounds}"
    out = torch.empty(programs, dtype=torch.int32, device=data.device)
    return lambda: _read[(programs,)](data, out, ROUNDS=rounds, BLOCK=block, num_warps=8)
