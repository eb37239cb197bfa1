"""The reference ops in bf16, on the CPU and on CUDA, against the same ops in fp32 on the CPU."""

from dataclasses import dataclass

import pytest
import torch

from llama3.config import ModelConfig, RopeScaling
from llama3.forward_batch import DecodeBatch, PrefillBatch
from llama3.kv_cache import KVCache
from llama3.ops.reference import ReferenceOps
from llama3.rope import RopeTable
from tests.numerics import assert_within_contract

OPS = ReferenceOps()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass
class Case:
    config: ModelConfig
    rope: RopeTable
    qkv: torch.Tensor
    past: torch.Tensor


def config_of(head_dim: int, num_heads: int, num_kv_heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=1, hidden_size=256, intermediate_size=320, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, vocab_size=300, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), tie_word_embeddings=True, dtype=torch.bfloat16,
        bos_token_id=None, eos_token_ids=frozenset(),
    )  # fmt: skip


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """bf16 values held in fp32, so that every precision starts from the same numbers."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16().float()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 130])
def test_projections(device: str, num_tokens: int) -> None:
    x, norm, residual = random(num_tokens, 256), random(256, seed=1), random(num_tokens, 256, seed=2)
    weight, gate_up = random(384, 256, seed=3, scale=0.06), random(640, 256, seed=4, scale=0.06)
    down = random(256, 320, seed=5, scale=0.06)

    def compute(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        xs, ns, rs, ws, gs, ds = (t.to(device, dtype) for t in (x, norm, residual, weight, gate_up, down))
        mid = OPS.norm_swiglu(xs, ns, gs, 1e-5)
        return [
            OPS.norm_linear(xs, ns, ws, 1e-5),
            mid,
            OPS.linear_add(mid, ds, rs),
            OPS.embed(torch.tensor([3], device=device), ws)[0],
        ]

    for result, truth, same in zip(
        compute(torch.bfloat16, device), compute(torch.float32, "cpu"), compute(torch.bfloat16, "cpu"), strict=True
    ):
        assert_within_contract(result, truth, same)


def test_swiglu_pairs_gate_rows_with_their_up_rows() -> None:
    """Against the unpacked definition, so that the grouping by eight cannot be wrong in both places."""
    x, gate, up = random(5, 256), random(320, 256, seed=1, scale=0.06), random(320, 256, seed=2, scale=0.06)
    packed = torch.stack((gate.view(40, 8, 256), up.view(40, 8, 256)), dim=1).reshape(640, 256)
    normed = torch.nn.functional.rms_norm(x, (256,), torch.ones(256), 1e-5)
    expected = torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)
    torch.testing.assert_close(OPS.norm_swiglu(x, torch.ones(256), packed, 1e-5), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("head_dim", "num_heads", "num_kv_heads"), [(64, 8, 8), (64, 8, 2), (128, 3, 1), (128, 8, 1)])
def test_attention_over_a_poisoned_cache(device: str, head_dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Prefill in two pieces, then a decode step with an idle row; NaN lies wherever nothing was written."""
    config = config_of(head_dim, num_heads, num_kv_heads)
    lengths, more, slots = (1, 64, 100), (3, 1, 40), (2, 0, 3)
    first, second = random(sum(lengths), config.qkv_size), random(sum(more), config.qkv_size, seed=1)
    last = random(4, config.qkv_size, seed=2)

    def compute(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        rope = RopeTable.build(config, 256, device)
        cache = KVCache(config, 4, 192, dtype, device)
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
        results = []
        for qkv, counts in ((first, lengths), (second, more)):
            batch = PrefillBatch.build(slots, counts, cache.reserve(slots, counts), device)
            results.append(OPS.rope_append_attend(qkv.to(device, dtype), rope, cache.layer(0), batch))
        starts = cache.reserve(slots, (1, 1, 1))
        rows = torch.tensor([*slots, 1], dtype=torch.int32, device=device)
        positions = torch.tensor([*starts, -1], dtype=torch.int32, device=device)
        step = DecodeBatch(rows, positions, max_context_len=192)
        results.append(OPS.rope_append_attend(last.to(device, dtype), rope, cache.layer(0), step))
        assert torch.all(results[-1][3] == 0)
        assert torch.isnan(cache.k[0, 1 * cache.blocks_per_slot]).all(), "an idle row's slot was written"
        return results

    for result, truth, same in zip(
        compute(torch.bfloat16, device), compute(torch.float32, "cpu"), compute(torch.bfloat16, "cpu"), strict=True
    ):
        assert_within_contract(result, truth, same)
