"""What a forward pass is told besides token ids: which slots its tokens belong to, and at which positions.

Everything that a captured decode step reads lies in device tensors of fixed address; prefill shapes differ from call
to call anyway, so a prefill batch also keeps its lengths on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llama3.device import to_device


@dataclass(frozen=True)
class PrefillBatch:
    """Prompts packed end to end without padding: T tokens of B sequences.

    slots, positions: int64 [T], of each token. seq_starts: int32 [B + 1], where each sequence's tokens begin.
    seq_slots, seq_lens, past_lens: B host integers: its slot, its new tokens, its tokens already in the cache.
    comes_again: calls of the same lengths follow, so that preparing for them pays.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    seq_starts: torch.Tensor
    seq_slots: tuple[int, ...]
    seq_lens: tuple[int, ...]
    past_lens: tuple[int, ...]
    comes_again: bool = False

    @classmethod
    def build(
        cls,
        seq_slots: Sequence[int],
        seq_lens: Sequence[int],
        past_lens: Sequence[int],
        device: torch.device | str,
    ) -> "PrefillBatch":
        starts, slots, positions = token_places(seq_slots, seq_lens, past_lens)
        return cls(
            slots=to_device(slots, torch.int64, torch.device(device)),
            positions=to_device(positions, torch.int64, torch.device(device)),
            seq_starts=to_device(starts, torch.int32, torch.device(device)),
            seq_slots=tuple(seq_slots),
            seq_lens=tuple(seq_lens),
            past_lens=tuple(past_lens),
        )


def token_places(
    seq_slots: Sequence[int], seq_lens: Sequence[int], past_lens: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64: where each sequence's tokens begin and the last one's end, [B + 1]; each token's slot and position, [T].

    By NumPy, which takes a third of PyTorch's time for arrays this small: the GPU may be waiting.
    """
    starts = np.concatenate(([0], np.cumsum(seq_lens)))
    slots = np.repeat(seq_slots, seq_lens)
    positions = np.arange(starts[-1]) + np.repeat(past_lens - starts[:-1], seq_lens)
    return starts, slots, positions


@dataclass(frozen=True)
class DecodeBatch:
    """One new token for each of B sequences.

    slots: int32 [B]. positions: int32 [B], the index of the new token, which is the number of tokens already cached;
    a negative position marks an idle row, which attends to nothing, writes nothing and returns zeros.
    max_context_len: a bound known on the host on `positions + 1`.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    max_context_len: int
