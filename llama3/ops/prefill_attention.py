"""Attention of packed prompts, by the fastest library kernel for their lengths (docs/cuda-ops.md has the measurements).

Much work, prompts equally long and nothing cached: cuDNN over a dense view of the packed tensors, twice as fast once it
has made a plan for the shape, which takes some 30 ms. Otherwise: FlashAttention 2 with cumulative lengths, which reads
keys and values from the packed projection, or from a gathered copy of the cache where prompts continue behind cached
tokens.
"""

from dataclasses import dataclass

import torch

from llama3.forward_batch import PrefillBatch
from llama3.kv_cache import LayerCache
from llama3.ops import elementwise

# FLOPs of one layer from which on cuDNN is worth its plan: where a shape may never come again it must save 4 ms a
# forward pass, in a captured call, of few shapes that come again and again, half a millisecond.
DENSE_MIN_FLOPS = 1e11
DENSE_MIN_FLOPS_AGAIN = 9e9


@dataclass(frozen=True)
class PrefillPlan:
    """What attention needs to know of a batch, the same for all layers.

    key_starts: int32 [B + 1], where each sequence's keys begin once packed; key_slots: int32 [B], or None if nothing
    is cached before this call, so that the keys are the call's own. max_queries, max_keys: of any sequence; num_keys:
    of all.
    """

    batch: PrefillBatch
    key_starts: torch.Tensor
    key_slots: torch.Tensor | None
    max_queries: int
    max_keys: int
    num_keys: int
    equal_lengths: bool

    @classmethod
    def of(cls, batch: PrefillBatch) -> "PrefillPlan":
        key_lens = [past + new for past, new in zip(batch.past_lens, batch.seq_lens, strict=True)]
        key_starts, key_slots = batch.seq_starts, None
        if any(batch.past_lens):
            starts = [0]
            for n in key_lens:
                starts.append(starts[-1] + n)
            # One copy, from pinned memory: the host does not wait for what the GPU is doing.
            packed = torch.tensor([*starts, *batch.seq_slots], dtype=torch.int32).pin_memory()
            packed = packed.to(batch.seq_starts.device, non_blocking=True)
            key_starts, key_slots = packed.split((len(starts), len(key_lens)))
        return cls(
            batch=batch,
            key_starts=key_starts,
            key_slots=key_slots,
            max_queries=max(batch.seq_lens),
            max_keys=max(key_lens),
            num_keys=sum(key_lens),
            equal_lengths=key_slots is None and len(set(batch.seq_lens)) == 1,
        )


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, plan: PrefillPlan) -> torch.Tensor:
    """Causal attention within each packed sequence, and over what its slot already held.

    q [T, Hq, D], k and v [T, Hkv, D] with contiguous columns, already in the cache too -> [T, Hq, D].
    """
    # Two products of 2 FLOPs a multiplication, half of each above the diagonal and left out.
    flops = 2 * q.shape[0] * plan.max_queries * q.shape[1] * q.shape[2]
    least = DENSE_MIN_FLOPS_AGAIN if plan.batch.comes_again else DENSE_MIN_FLOPS
    if plan.equal_lengths and flops >= least:
        return attend_dense(q, k, v, len(plan.batch.seq_lens))
    if plan.key_slots is not None:
        k, v = elementwise.gather_cache(cache, plan.key_slots, plan.key_starts, plan.num_keys)
    return attend_packed(q, k, v, plan)


def attend_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_seqs: int) -> torch.Tensor:
    """cuDNN's fused attention over `num_seqs` equally long sequences; shapes as in `attend`."""
    heads_first = [x.unflatten(0, (num_seqs, -1)).transpose(1, 2) for x in (q, k, v)]  # [B, heads, S, D]
    # The aten op itself: the public function would choose a backend by its own rules, FlashAttention 2 among them.
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, False, 0.0, True, False)[0]
    return out.transpose(1, 2).reshape(q.shape)


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PrefillPlan) -> torch.Tensor:
    """FlashAttention 2 over sequences of any lengths; the causal mask is aligned to each one's last key."""
    starts = (plan.batch.seq_starts, plan.key_starts)
    lengths = (plan.max_queries, plan.max_keys)
    return torch.ops.aten._flash_attention_forward(q, k, v, *starts, *lengths, 0.0, True, False)[0]
