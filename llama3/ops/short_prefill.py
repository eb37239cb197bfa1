"""Attention of short prompts in one kernel, `csrc/short_prefill/`, rotation and cache included. Checks, allocation,
launch."""

import functools
from types import ModuleType

import torch

from llama3.errors import UserError
from llama3.kv_cache import LayerCache
from llama3.ops import elementwise
from llama3.ops.one_kernel import num_sms
from llama3.ops.prefill_attention import PrefillPlan
from llama3.ops.tensor_error import check_tensors
from llama3.rope import RopeTable

MAX_TOKENS = 128  # of a prompt: its keys and values lie in shared memory
BLOCKS_PER_SM = 3


@functools.cache
def library() -> ModuleType:
    """The compiled kernel, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("short_prefill")


def takes(plan: PrefillPlan) -> bool:
    """Whether every prompt is short, and nothing is cached before any."""
    return plan.key_slots is None and plan.max_queries <= MAX_TOKENS


def block_heads(num_seqs: int, num_heads: int, num_kv_heads: int, num_sms: int) -> int:
    """Query heads of a thread block: all that share a kv head, which is then read once, or fewer to fill the GPU."""
    group = num_heads // num_kv_heads
    return max(1, min(group, num_seqs * num_heads // (BLOCKS_PER_SM * num_sms)))


def rope_append_attend(qkv: torch.Tensor, rope: RopeTable, cache: LayerCache, plan: PrefillPlan) -> torch.Tensor:
    """Rotate q and k, store k and v in the cache, causal attention within each prompt: the seam's op for a prefill.

    qkv [T, (Hq + 2 Hkv) D], all q heads, then all k heads, then all v heads -> [T, Hq D]. `takes(plan)` must hold.
    Raises UserError naming the tensor and the shape expected.
    """
    if not takes(plan):
        raise UserError(
            f"short_prefill: prompts have up to {plan.max_keys} tokens, {plan.max_queries} of them new;"
            f" expected new ones alone, up to {MAX_TOKENS}"
        )
    batch, num_kv_heads, head_dim = plan.batch, cache.k.shape[1], cache.k.shape[3]
    num_tokens, num_heads = elementwise.check_projection(
        "short_prefill", qkv, rope, cache, batch.slots, batch.positions
    )
    num_seqs = batch.seq_starts.numel() - 1
    check_tensors("short_prefill", qkv.device, torch.int32, seq_starts=(batch.seq_starts, (num_seqs + 1,)))
    out = qkv.new_empty(num_tokens, num_heads * head_dim)
    operands = (qkv, rope.cos, rope.sin, batch.slots, batch.positions, batch.seq_starts, out, cache.k, cache.v)
    library().rope_append_attend(
        *(tensor.data_ptr() for tensor in operands),
        num_seqs=num_seqs,
        max_tokens=plan.max_queries,
        num_positions=rope.cos.shape[0],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        blocks_per_slot=cache.blocks_per_slot,
        block_heads=block_heads(num_seqs, num_heads, num_kv_heads, num_sms(qkv.device)),
        dtype=elementwise.DTYPES[qkv.dtype],
        overlap=elementwise.can_overlap(qkv.device),
        stream=torch.cuda.current_stream(qkv.device).cuda_stream,
    )
    return out
