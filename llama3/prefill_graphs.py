"""Prefill of short prompts in captured graphs: one launch where the host would take milliseconds over a hundred.

Graphs have fixed sizes, so a call is padded to the next one: tokens that are stored nowhere, sequences of no tokens.
A size is captured when it is first needed.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llama3.config import ModelConfig
from llama3.decode_state import IDLE
from llama3.forward_batch import PrefillBatch, token_places
from llama3.kv_cache import KVCache
from llama3.model import Transformer

TOKEN_SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)
SEQUENCE_SIZES = (1, 8)
# Products of a layer up to which a capture pays although calls are padded: beyond it the GPU takes longer than the host
# takes to launch op by op. These are 2048 tokens of the 1B shape, 1024 of 3B and 512 of 8B.
MAX_LAYER_FLOPS = 2.5e11


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
        self._max_tokens = largest_size(model.config)

    def takes(self, seq_lens: Sequence[int], past_lens: Sequence[int]) -> bool:
        """Whether there is a graph for such a call."""
        return not any(past_lens) and sum(seq_lens) <= self._max_tokens and len(seq_lens) <= SEQUENCE_SIZES[-1]

    def run(self, token_ids: "array[int]", seq_slots: Sequence[int], seq_lens: Sequence[int]) -> torch.Tensor:
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
        token_ids, slots, positions, ends = inputs.split((num_tokens, num_tokens, num_tokens, num_seqs + 2))
        starts = ends.int()
        if num_seqs == 1:
            # Padding behind the only sequence is as good as part of it: no token attends to what comes after.
            lens: tuple[int, ...] = (num_tokens,)
            starts = starts[::2]
        else:
            # One more sequence than there may be: the padding. The lengths on the host are bounds, and unequal.
            lens = (num_tokens, *[0] * num_seqs)
        host_lens = ((0,) * len(lens), lens, (0,) * len(lens))
        batch = PrefillBatch(slots, positions, starts.contiguous(), *host_lens, comes_again=True)
        return self.model.logits(self.model.forward(token_ids, batch, self.cache, wanted=ends[1:-1] - 1))


def largest_size(config: ModelConfig) -> int:
    """The largest of TOKEN_SIZES that pays for a model."""
    token_flops = 2 * config.hidden_size * (config.qkv_size + config.q_size + 3 * config.intermediate_size)
    return max(s for s in TOKEN_SIZES if s * token_flops <= MAX_LAYER_FLOPS or s == TOKEN_SIZES[0])


def _pack(
    token_ids: "array[int]", seq_slots: Sequence[int], seq_lens: Sequence[int], num_tokens: int, num_seqs: int
) -> torch.Tensor:
    """Token ids, slots and positions [num_tokens] each, and starts [num_seqs + 2] of the sequences and the padding."""
    starts, slots, positions = token_places(seq_slots, seq_lens, [0] * len(seq_lens))
    packed = np.zeros(3 * num_tokens + num_seqs + 2, dtype=np.int64)
    tokens, ends = packed[: 3 * num_tokens].reshape(3, num_tokens), packed[3 * num_tokens :]
    tokens[:, : len(token_ids)] = np.frombuffer(token_ids, np.uintc), slots, positions
    tokens[2, len(token_ids) :] = IDLE
    ends[: len(starts)], ends[len(starts) : -1], ends[-1] = starts, starts[-1], num_tokens
    return torch.from_numpy(packed)
