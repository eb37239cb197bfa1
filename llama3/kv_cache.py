"""The static KV cache: fixed slots of fixed size, and the cursor that says how far each one is filled.

K and V are each [num_layers, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim], so one head's block is one contiguous
run of memory. Slot s owns blocks [s * blocks_per_slot, (s + 1) * blocks_per_slot): a block number is arithmetic, and
the attention kernels also take a block table in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama3.config import ModelConfig
from llama3.errors import CapacityError

BLOCK_SIZE = 64


@dataclass(frozen=True)
class LayerCache:
    """One layer's k and v, [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]; a slot is blocks_per_slot blocks."""

    k: torch.Tensor
    v: torch.Tensor
    blocks_per_slot: int

    def write(self, slots: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v [T, num_kv_heads, head_dim] at positions [T] of slots [T]; a negative position stores nothing."""
        # A row that stores nothing repeats one that does, or where none does keeps what is there: selecting by `where`
        # instead of by shape spares a host read, and a value kept could be what another row has just replaced.
        stores = positions >= 0
        source = torch.where(stores, torch.arange(len(stores), device=stores.device), stores.int().argmax())
        slots, positions, k, v = (tensor[source] for tensor in (slots, positions.clamp(min=0), k, v))
        blocks, rows = slots * self.blocks_per_slot + positions // BLOCK_SIZE, positions % BLOCK_SIZE
        for cache, new in ((self.k, k), (self.v, v)):
            cache[blocks, :, rows] = torch.where(stores.any(), new, cache[blocks, :, rows])

    def read(self, slots: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` positions of slots [B]: k and v as [B, num_kv_heads, length, head_dim] copies."""
        num_blocks = -(-length // BLOCK_SIZE)
        blocks = slots[:, None] * self.blocks_per_slot + torch.arange(num_blocks, device=slots.device)

        def gather(cache: torch.Tensor) -> torch.Tensor:
            return cache[blocks].transpose(1, 2).flatten(2, 3)[:, :, :length]  # [B, Hkv, blocks * 64, D], trimmed

        return gather(self.k), gather(self.v)


class KVCache:
    """Keys and values of every layer for `num_slots` sequences of at most `max_len` tokens, and their lengths.

    `lengths[s]` counts the tokens that slot s holds or that have been reserved for the forward pass about to run.
    """

    def __init__(
        self, config: ModelConfig, num_slots: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.num_slots, self.max_len = num_slots, max_len
        self.blocks_per_slot = -(-max_len // BLOCK_SIZE)
        shape = (
            config.num_layers,
            num_slots * self.blocks_per_slot,
            config.num_kv_heads,
            BLOCK_SIZE,
            config.head_dim,
        )
        # Never read before written, so it needs no zeroing; tests fill it with NaN to prove that.
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = [0] * num_slots

    @staticmethod
    def num_bytes(config: ModelConfig, num_slots: int, max_len: int, dtype: torch.dtype) -> int:
        """Bytes that a cache of this size takes, K and V of all layers together."""
        tokens = num_slots * -(-max_len // BLOCK_SIZE) * BLOCK_SIZE
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * tokens * dtype.itemsize

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self.k[index], self.v[index], self.blocks_per_slot)

    def reset(self, slot: int) -> None:
        """Forget what `slot` holds."""
        self.lengths[slot] = 0

    def reserve(self, slots: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Advance the cursors by `counts` tokens and return where each run starts.

        Raises CapacityError, with no cursor moved, if a slot would pass max_len.
        """
        for slot, count in zip(slots, counts, strict=True):
            if self.lengths[slot] + count > self.max_len:
                raise CapacityError(
                    f"KV cache slot {slot} holds {self.lengths[slot]} tokens and cannot take {count} more: "
                    f"its limit is {self.max_len} (max_model_len)"
                )
        starts = [self.lengths[slot] for slot in slots]
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
        return starts

    def copy_slot(self, source: int, target: int) -> None:
        """Make `target` hold what `source` holds: a prompt shared by several samples is computed once."""
        length = self.lengths[source]
        num_blocks = -(-length // BLOCK_SIZE)
        from_block, to_block = source * self.blocks_per_slot, target * self.blocks_per_slot
        for cache in (self.k, self.v):
            cache[:, to_block : to_block + num_blocks] = cache[:, from_block : from_block + num_blocks]
        self.lengths[target] = length
