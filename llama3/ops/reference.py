"""What each op means, in plain PyTorch: the CPU path, and the truth that the kernels are tested against.

T tokens, hidden size H, Hq query and Hkv key/value heads of size D, feed-forward size F, vocabulary V.
"""

import torch
import torch.nn.functional as F

from llama3.config import GATE_UP_GROUP, ModelConfig
from llama3.decode_state import IDLE, DecodeState
from llama3.forward_batch import DecodeBatch, PrefillBatch
from llama3.kv_cache import KVCache, LayerCache
from llama3.rope import RopeTable
from llama3.sampling import SamplingTensors, sample_tokens
from llama3.weights import ModelWeights


class ReferenceOps:
    """The seam's ops in PyTorch, on any device and in any floating dtype."""

    name = "reference"
    can_capture_prefill = False  # attention goes by the lengths on the host

    def max_rows(self, config: ModelConfig, device: torch.device) -> int | None:
        """The most sequences of one decode step; None if only memory limits them."""
        return None

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """token_ids [T], table [V, H] -> [T, H], and what norm_linear takes as squares, or None."""
        return F.embedding(token_ids, table), None

    def norm_linear(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        squares: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RMSNorm, then a projection: x [T, H], weight [N, H] -> [T, N].

        norm_weight: [H], or None where it is part of the weight. squares: what `linear_add_squares` gave beside x; an
        implementation may go by them.
        """
        return F.linear(rms_norm(x, norm_weight, eps), weight)

    def rope_append_attend(
        self, qkv: torch.Tensor, rope: RopeTable, cache: LayerCache, batch: PrefillBatch | DecodeBatch
    ) -> torch.Tensor:
        """Rotate q and k, append k and v to the cache, attend causally: qkv [T, (Hq + 2 Hkv) D] -> [T, Hq D]."""
        num_kv_heads, head_dim = cache.k.shape[1], cache.k.shape[3]
        q, k, v = qkv.unflatten(-1, (-1, head_dim)).tensor_split((-2 * num_kv_heads, -num_kv_heads), dim=1)
        # An idle row's position is -1: rotate it anywhere, its result is thrown away.
        rotation = batch.positions.clamp(min=0).long()
        q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
        cache.write(batch.slots.long(), batch.positions.long(), k, v)
        out = attend_prefill(q, k, v, cache, batch) if isinstance(batch, PrefillBatch) else attend(q, cache, batch)
        return out.flatten(1)

    def linear_add(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x [T, N], weight [H, N], residual [T, H] -> residual + x weight^T, [T, H]."""
        return residual + F.linear(x, weight)

    def linear_add_squares(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """linear_add, and for the norm that follows sums of squares over parts of its columns, fp32 [P, T], whose sum
        over P is a token's; None where nobody would gain by them, as here."""
        return self.linear_add(x, weight, residual), None

    def norm_swiglu(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        gate_up: torch.Tensor,
        eps: float,
        squares: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RMSNorm, gate and up projections, silu(gate) * up: x [T, H], gate_up [2 F, H] -> [T, F]."""
        packed = F.linear(rms_norm(x, norm_weight, eps), gate_up).unflatten(-1, (-1, 2, GATE_UP_GROUP))
        gate, up = packed.unbind(2)  # [T, F / 8, 8] each
        return (F.silu(gate) * up).flatten(1)

    def sample(self, logits: torch.Tensor, params: SamplingTensors, positions: torch.Tensor) -> torch.Tensor:
        """logits [B, V], positions [B] of the tokens to be drawn -> token ids, int64 [B]."""
        return sample_tokens(logits, params, positions)

    def sample_and_place(
        self,
        logits: torch.Tensor,
        params: SamplingTensors,
        state: DecodeState,
        forbid_early_stops: bool,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The end of a decode step over the state's first B rows: draw the next tokens, int64 [B], and store them.

        logits [B, V] follow the tokens at `state.positions`; they may be changed. What an idle row draws is undefined.
        out: int64 [B], receives the tokens too if given.
        """
        rows = slice(0, logits.shape[0])
        idle = state.positions[rows] < 0
        positions = state.positions[rows] + 1
        if forbid_early_stops:
            state.forbid_early_stops(logits, rows, positions)
        token_ids = self.sample(logits, params, positions)
        state.place(rows, token_ids, torch.where(idle, IDLE, positions))
        return token_ids if out is None else out.copy_(token_ids)

    def whole_step(
        self, config: ModelConfig, weights: ModelWeights, rope: RopeTable, cache: KVCache, state: DecodeState
    ) -> None:
        """One launch for a whole decode step of one sequence, where there is one: here there is none."""
        return None


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """fp32 inside, cast back, then times the weight, if any: the order of the Llama reference code. x [T, H]."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else weight * normed


def attend_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, batch: PrefillBatch
) -> torch.Tensor:
    """Causal attention within each packed sequence, and over what its slot already held.

    q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D].
    """
    outputs = []
    runs = zip(
        q.split(batch.seq_lens),
        k.split(batch.seq_lens),
        v.split(batch.seq_lens),
        batch.seq_slots,
        batch.past_lens,
        strict=True,
    )
    for q_run, k_run, v_run, slot, past_len in runs:
        heads_first = (q_run.transpose(0, 1)[None], k_run.transpose(0, 1)[None], v_run.transpose(0, 1)[None])
        if past_len == 0:
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        else:
            length = past_len + q_run.shape[0]
            keys, values = cache.read(torch.tensor([slot], device=q.device), length)
            query_positions = torch.arange(past_len, length, device=q.device)
            mask = torch.arange(length, device=q.device)[None, :] <= query_positions[:, None]
            out = F.scaled_dot_product_attention(heads_first[0], keys, values, attn_mask=mask, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def attend(q: torch.Tensor, cache: LayerCache, batch: DecodeBatch) -> torch.Tensor:
    """One query a sequence over its slot, the token just appended included. q [B, Hq, D] -> [B, Hq, D]."""
    keys, values = cache.read(batch.slots.long(), batch.max_context_len)
    visible = torch.arange(batch.max_context_len, device=q.device)[None, :] <= batch.positions[:, None]
    # What lies past the end was never written and may be NaN, which neither adding -inf nor multiplying by 0 removes.
    keys, values = (torch.where(visible[:, None, :, None], cached, 0) for cached in (keys, values))
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=visible[:, None, None], enable_gqa=True)
    return torch.where((batch.positions >= 0)[:, None, None], out[:, :, 0], 0)
