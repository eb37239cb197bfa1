"""What can be known of attention for short prompts without a GPU: what it refuses, and how it is shared out."""

from dataclasses import replace

import pytest
import torch

from llama3.errors import UserError
from llama3.forward_batch import PrefillBatch
from llama3.kv_cache import LayerCache
from llama3.ops import short_prefill
from llama3.ops.prefill_attention import PrefillPlan
from llama3.rope import RopeTable
from llama3.shapes import shape_config

GOOD = dict.fromkeys(("qkv", "cos", "sin", "slots", "positions", "starts", "out", "k_cache", "v_cache"), 4096)
GOOD |= {"num_seqs": 2, "max_tokens": 128, "num_positions": 128, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128}
GOOD |= {"blocks_per_slot": 2, "block_heads": 4, "dtype": 0, "overlap": False, "stream": 0}


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head_dim": 96}, "head_dim is 96; supported: 64, 128"),
        ({"num_seqs": 0}, "there are no prompts"),
        ({"max_tokens": 0}, "max_tokens is 0; supported: 1 to 128"),
        ({"max_tokens": 129}, "max_tokens is 129"),
        ({"num_positions": 0}, "no positions"),
        ({"num_heads": 7}, "num_heads must be a multiple of num_kv_heads"),
        ({"block_heads": 0}, "block_heads and blocks_per_slot must be at least 1"),
        ({"blocks_per_slot": 0}, "block_heads and blocks_per_slot must be at least 1"),
        ({"qkv": 4098}, "qkv must be 16-byte aligned"),
        ({"sin": 4100}, "sin must be 16-byte aligned"),
        ({"v_cache": 4104}, "v_cache must be 16-byte aligned"),
    ],
)
def test_the_kernel_refuses(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short_prefill.library().rope_append_attend(**(GOOD | wrong))


@pytest.mark.nvcc
def test_both_sides_agree() -> None:
    assert short_prefill.library().MAX_TOKENS == short_prefill.MAX_TOKENS
    assert short_prefill.library().BLOCKS_PER_SM == short_prefill.BLOCKS_PER_SM


def plan_of(lengths: list[int], past: list[int] | None = None) -> PrefillPlan:
    return PrefillPlan.of(PrefillBatch.build(range(len(lengths)), lengths, past or [0] * len(lengths), "cpu"))


def test_which_calls_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # needs a GPU
    assert short_prefill.takes(plan_of([128, 1, 77]))
    assert not short_prefill.takes(plan_of([128, 129]))
    assert not short_prefill.takes(plan_of([3, 3], [0, 1]))


@pytest.mark.parametrize(
    ("num_seqs", "heads", "expected"),
    [(1, (32, 8), 1), (24, (32, 8), 1), (25, (32, 8), 2), (50, (32, 8), 4), (256, (32, 8), 4), (256, (8, 8), 1)],
)
def test_heads_of_a_block_on_132_multiprocessors(num_seqs: int, heads: tuple[int, int], expected: int) -> None:
    """As many as share a kv head, where there are still blocks for every place."""
    assert short_prefill.block_heads(num_seqs, *heads, 132) == expected


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    cache = LayerCache(*torch.zeros(2, 3, 2, 64, 64, dtype=torch.bfloat16).unbind(), blocks_per_slot=3)
    rope, plan = RopeTable.build(shape_config("1b"), 8), plan_of([2])
    qkv = torch.zeros(2, 8 * 64, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"short_prefill: qkv is .*expected \[T, \(Hq \+ 2 \* 2\) \* 64\]"):
        short_prefill.rope_append_attend(qkv[:, :256], rope, cache, plan)
    with pytest.raises(UserError, match="short_prefill: qkv is on cpu"):
        short_prefill.rope_append_attend(qkv, rope, cache, plan)
    with pytest.raises(UserError, match=r"in bfloat16 or float16, not in torch\.float32"):
        short_prefill.rope_append_attend(qkv.float(), rope, replace(cache, k=cache.k.float()), plan)
    with pytest.raises(UserError, match=r"up to 9 tokens, 2 of them new; expected new ones alone, up to 128"):
        short_prefill.rope_append_attend(qkv, rope, cache, plan_of([2], [7]))
