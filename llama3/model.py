"""The Transformer: five ops a layer over the seam in `llama3.ops`. Read this first.

Shapes: T tokens in the call, hidden size H, Hq query and Hkv key/value heads of size D, feed-forward size F.
"""

import torch

from llama3.config import ModelConfig
from llama3.forward_batch import DecodeBatch, PrefillBatch
from llama3.kv_cache import KVCache
from llama3.ops import Ops
from llama3.rope import RopeTable
from llama3.weights import ModelWeights


class Transformer:
    """A Llama-3 decoder. It holds weights and nothing that changes: the cache and the batch are arguments."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops, rope: RopeTable) -> None:
        self.config, self.weights, self.ops, self.rope = config, weights, ops, rope

    def forward(
        self,
        token_ids: torch.Tensor,
        batch: PrefillBatch | DecodeBatch,
        cache: KVCache,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """token_ids [T] -> hidden states [T, H] after the last layer, before the final norm.

        wanted: int64 [R], the tokens whose states are asked for, [R, H]; then the last layer computes nothing for
        others once their keys and values are cached.
        """
        ops, eps = self.ops, self.config.rms_norm_eps
        x, squares = ops.embed(token_ids, self.weights.embed)
        for index, layer in enumerate(self.weights.layers):
            qkv = ops.norm_linear(x, layer.attn_norm, layer.qkv, eps, squares)
            attn = ops.rope_append_attend(qkv, self.rope, cache.layer(index), batch)
            if wanted is not None and index == self.config.num_layers - 1:
                x, attn = x[wanted], attn[wanted]
            x, squares = ops.linear_add_squares(attn, layer.o, x)
            mid = ops.norm_swiglu(x, layer.mlp_norm, layer.gate_up, eps, squares)
            x, squares = ops.linear_add_squares(mid, layer.down, x)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] -> next-token logits [T, V]."""
        return self.ops.norm_linear(hidden, self.weights.final_norm, self.weights.lm_head, self.config.rms_norm_eps)

    def prefill(self, token_ids: torch.Tensor, batch: PrefillBatch, cache: KVCache) -> torch.Tensor:
        """Packed prompts, token_ids [T] -> logits of each sequence's last token, [B, V]."""
        return self.logits(self.forward(token_ids, batch, cache, wanted=batch.seq_starts[1:].long() - 1))

    def decode_step(self, token_ids: torch.Tensor, batch: DecodeBatch, cache: KVCache) -> torch.Tensor:
        """One token a sequence, token_ids [B] -> logits [B, V]."""
        return self.logits(self.forward(token_ids, batch, cache))
