"""How a product of csrc/skinny_linear/ is cut for the GPU: the plan that was found fastest, or else a rule."""

import functools
from typing import NamedTuple

from llama3.ops import one_kernel, plan_table
from llama3.ops.one_kernel import LINEAR_ADD

FAMILY = "skinny_linear"
TOKEN_COUNTS = (8, 16, 32)  # that the kernels are compiled for; others run in the next larger one
MAX_TILE_ROWS = 128
SPLITS = (1, 2, 4)
MAX_STAGES = 16
# Two neighbours in the chain of kernels fit on a multiprocessor together, and where one of them is a linear_add, it
# fits only once: a kernel's blocks should spread over all multiprocessors, and these start when those are empty, behind
# attention.
SHARED_BYTES, ADDING_BYTES = 106 << 10, 119 << 10


class Plan(NamedTuple):
    """How a product runs: rows of weight that one cluster of blocks makes, and its blocks, among which the inner
    dimension is split; shared memory that a block may use; how many stages are left to ask for when the next kernel may
    start; how many stages of weight are asked for before the previous kernel has ended, at most."""

    tile_rows: int
    splits: int
    shared_bytes: int = SHARED_BYTES
    trigger: int = 4
    ahead: int = MAX_STAGES


@functools.cache
def choose_plan(form: int, num_tokens: int, num_rows: int, size: int, num_sms: int, fast_memory: bool = False) -> Plan:
    """The plan of the table, if it has one, else that whose busiest multiprocessor has the fewest bytes of weight and x
    to read, with what was measured.

    Clusters of four find fewer places than their blocks would alone. Two blocks of one kernel on a multiprocessor keep
    more requests under way, which pays in long products and costs the next kernel its place in short ones. With more
    than 16 tokens it is arithmetic that takes long: a tile costs what its warps could have multiplied, and the second
    block pays sooner.
    """
    few, tokens = num_tokens <= 16, padded(num_tokens)
    if found := plan_table.look_up(FAMILY, (form, tokens, num_rows, size), num_sms, fast_memory):
        return Plan(**found)

    def cost(plan: Plan) -> tuple[float, float]:
        blocks = -(-num_rows // plan.tile_rows) * plan.splits
        rounds = -(-blocks // num_sms)
        rows = plan.tile_rows if few else 64 if plan.tile_rows <= 64 else MAX_TILE_ROWS
        block_bytes = (rows + tokens) * size / plan.splits * 2
        is_long = block_bytes >= (400e3 if few or plan.splits == 1 else 250e3)
        deep = (0.8 if few else 0.7) if rounds == 2 and is_long else 1.0
        crowded = (1.15 if few else 1.25) if plan.splits == 4 else 1.0
        return rounds * block_bytes * deep * crowded, rounds * (plan.tile_rows + tokens) * size / plan.splits

    rows = range(MAX_TILE_ROWS, min_tile_rows(num_tokens) - 1, -16)
    fills_alone = num_rows >= 0.9 * num_sms * MAX_TILE_ROWS
    splits = [s for s in SPLITS if s == 1 or (s * 256 <= size and not fills_alone)]
    shared_bytes = ADDING_BYTES if form == LINEAR_ADD else SHARED_BYTES
    return min((Plan(r, s, shared_bytes) for s in splits for r in rows if r >= 16 * s), key=cost)


def min_tile_rows(num_tokens: int) -> int:
    """The fewest rows of a tile for so many tokens; with fewer, x would outweigh the weights."""
    return 16 if num_tokens <= 16 else 48


def max_tile_rows(form: int, num_tokens: int) -> int:
    return MAX_TILE_ROWS


def padded(num_tokens: int) -> int:
    """The token count of the kernel that runs `num_tokens`."""
    return one_kernel.padded(num_tokens, TOKEN_COUNTS)
