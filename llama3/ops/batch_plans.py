"""How a product of csrc/batch_linear/ is cut for the GPU: the plan that was found fastest, or else a rule."""

import functools
from typing import NamedTuple

from llama3.ops import one_kernel, plan_table
from llama3.ops.one_kernel import LINEAR, LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU
from llama3.ops.skinny_linear import NARROW

FAMILY = "batch_linear"
TOKEN_COUNTS = (16, 32, 48, 64, 96, 128)  # that the kernels are compiled for; others run in the next larger one
TOKENS_AS_ROWS = 64  # of those counts: the one whose kernels take tokens as the tensor cores' rows, so tiles may be low
MAX_TALL_TOKENS = 64  # with more, SwiGLU's tiles have 128 rows at most
TILE_ROWS, UNIT_ROWS = 128, 16
MIN_TILE_ROWS, MAX_TILE_ROWS, LOW_TILE_ROWS = 64, 256, 32
STAGE_COLUMNS = 64  # or twice as many, of norm_linear's and linear_add's tiles up to MIN_TILE_ROWS, up to 64 tokens
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
MAX_STAGES = 24
# Of a deep ring, where the block can only start when the previous kernel ends: x would have to wait behind the rest.
AHEAD = 2


class Plan(NamedTuple):
    """How a product runs: blocks of the cluster that makes a tile, among which the inner dimension is split; shared
    memory that a block may use; how many stages are left to ask for when the next kernel may start; weight rows of a
    tile; how many stages of weight are asked for before the previous kernel has ended, at most; for how many stages x
    is there or under way, at most."""

    splits: int
    shared_bytes: int = SHARED_BYTES
    trigger: int = TRIGGER
    tile_rows: int = TILE_ROWS
    ahead: int = MAX_STAGES
    x_stages: int = MAX_STAGES


HEAD = Plan(1, 150 << 10, 4, MAX_TILE_ROWS, AHEAD, 3)  # every block makes many tiles


@functools.cache
def choose_plan(form: int, num_tokens: int, num_rows: int, size: int, num_sms: int, fast_memory: bool = False) -> Plan:
    """The plan of the table, if it has one. Else, on GPUs of fast memory and for long rows, tiles as tall as it
    takes to have one for every multiprocessor; else the split whose busiest multiprocessor has the fewest bytes to
    read, of weights, x, and other blocks' sums."""
    tokens, steps = padded(num_tokens), size // STAGE_COLUMNS
    if form == LINEAR:
        return HEAD._replace(tile_rows=max_tile_rows(form, tokens))
    if found := plan_table.look_up(FAMILY, (form, tokens, num_rows, size), num_sms, fast_memory):
        return Plan(**found)
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
    """Only SwiGLU's products and the head have so many rows that taller tiles than TILE_ROWS pay."""
    return MAX_TILE_ROWS if form in (NORM_SWIGLU, LINEAR) and padded(num_tokens) <= MAX_TALL_TOKENS else TILE_ROWS


def min_tile_rows(num_tokens: int) -> int:
    return LOW_TILE_ROWS if padded(num_tokens) == TOKENS_AS_ROWS else MIN_TILE_ROWS


def padded(num_tokens: int) -> int:
    """The token count of the kernel that runs `num_tokens`."""
    return one_kernel.padded(num_tokens, TOKEN_COUNTS)


def sent_bytes(tokens: int, splits: int) -> int:
    """What the blocks of a cluster send the one that finishes most of their tile."""
    return splits * -(-TILE_ROWS // UNIT_ROWS // splits) * UNIT_ROWS * tokens * 4
