"""Prefill of short prompts in captured graphs: one launch where the host would take milliseconds over a hundred.

Graphs have fixed sizes, so a call is padded to the next one: tokens of no sequence, which are stored nowhere, and
sequences of no tokens. A size is captured when it is first needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama3.decode_state import IDLE
from llama3.forward_batch import PrefillBatch
from llama3.kv_cache import KVCache
from llama3.model import Transformer

# Beyond the last of these the GPU takes longer than the host.
TOKEN_SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024)
SEQUENCE_SIZES = (1, 8)


@dataclass
class _Graph:
    """inputs: int64, the four arrays of `_pack` end to end. logits: [num_sequences, V], rewritten by each replay."""

    inputs: torch.Tensor
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class PrefillGraphs:
    """Captured prefills of prompts with nothing cached before them, over one model and one cache."""

    def __init__(self, model: Transformer, cache: KVCache, pool: Any) -> None:
        self.model, self.cache, self._pool = model, cache, pool
        self._graphs: dict[tuple[int, int], _Graph] = {}

    @staticmethod
    def takes(seq_lens: Sequence[int], past_lens: Sequence[int]) -> bool:
        """Whether there is a graph for such a call."""
        return not any(past_lens) and sum(seq_lens) <= TOKEN_SIZES[-1] and len(seq_lens) <= SEQUENCE_SIZES[-1]

    def run(self, token_ids: Sequence[int], seq_slots: Sequence[int], seq_lens: Sequence[int]) -> torch.Tensor:
        """Logits [B, V] of each sequence's last token, valid until the next call. The host does not wait."""
        num_tokens = next(size for size in TOKEN_SIZES if size >= len(token_ids))
        num_seqs = next(size for size in SEQUENCE_SIZES if size >= len(seq_lens))
        packed = _pack(token_ids, seq_slots, seq_lens, num_tokens, num_seqs).pin_memory()
        key = num_tokens, num_seqs
        if key in self._graphs:
            found = self._graphs[key]
            found.inputs.copy_(packed, non_blocking=True)
            found.graph.replay()
            logits = found.logits
        else:
            inputs = packed.to(self.cache.k.device, non_blocking=True)
            logits = self._forward(inputs, num_tokens, num_seqs)  # this call's, and the warm-up that a capture needs
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                captured = self._forward(inputs, num_tokens, num_seqs)
            self._graphs[key] = _Graph(inputs, graph, captured)
        return logits[: len(seq_lens)]

    def _forward(self, inputs: torch.Tensor, num_tokens: int, num_seqs: int) -> torch.Tensor:
        token_ids, slots, positions, starts = inputs.split((num_tokens, num_tokens, num_tokens, num_seqs + 2))
        # One more sequence than there may be: the padding. The lengths on the host are bounds, and unequal.
        lens = (num_tokens, *[0] * num_seqs)
        batch = PrefillBatch(slots, positions, starts.int(), (0,) * len(lens), lens, (0,) * len(lens))
        return self.model.logits(self.model.forward(token_ids, batch, self.cache, wanted=starts[1:-1] - 1))


def _pack(
    token_ids: Sequence[int], seq_slots: Sequence[int], seq_lens: Sequence[int], num_tokens: int, num_seqs: int
) -> torch.Tensor:
    """Token ids, slots and positions [num_tokens] each, and starts [num_seqs + 2] of the sequences and the padding."""
    padding = num_tokens - len(token_ids)
    slots: list[int] = []
    positions: list[int] = []
    starts = [0]
    for slot, length in zip(seq_slots, seq_lens, strict=True):
        slots += [slot] * length
        positions += range(length)
        starts.append(starts[-1] + length)
    starts += [starts[-1]] * (num_seqs - len(seq_lens)) + [num_tokens]
    return torch.tensor([*token_ids, *[0] * padding, *slots, *[0] * padding, *positions, *[IDLE] * padding, *starts])
