"""The persistent decode step where there is no GPU: it builds without spills, and says what it cannot run and why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llama3.decode_state import DecodeState
from llama3.errors import UserError
from llama3.kv_cache import KVCache
from llama3.ops import decode_step
from llama3.ops.decode_step import DecodeStep
from llama3.rope import RopeTable
from llama3.shapes import SHAPES, shape_config
from llama3.weights import empty_weights

H200 = (132, 232448)  # multiprocessors, shared memory a block may have


@pytest.mark.nvcc
@pytest.mark.parametrize("name", ["1b", "3b", "8b", "tiny"])
def test_published_shapes_are_supported(name: str) -> None:
    assert decode_step._shape_reason(SHAPES[name], *H200) is None


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float16}, "bfloat16"),
        ({"num_heads": 144, "num_kv_heads": 8}, "18"),
        ({"hidden_size": 128}, "which is 128"),
        ({"hidden_size": 2048 + 64}, "2112 columns"),
        ({"intermediate_size": 28672}, "28672 columns (the down projection)"),
        ({"num_layers": 4000}, "too few to stream"),
    ],
)
def test_reason_names_what_does_not_fit(change: dict, reason: str) -> None:
    assert reason in str(decode_step._shape_reason(replace(SHAPES["1b"], **change), *H200))


def test_cpu_is_refused_with_the_reason() -> None:
    config = shape_config("tiny")
    assert "needs an NVIDIA GPU" in str(DecodeStep.supports(config, "cpu"))
    weights = empty_weights(config, "cpu", torch.bfloat16)
    cache = KVCache(config, 1, 64, torch.bfloat16, "cpu")
    state = DecodeState(1, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        DecodeStep(config, weights, RopeTable.build(config, 64), cache, state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights", "weight 0 is torch.float16"),
        ("cache", r"cache.k is torch.float32 \[2, 1, 2, 64, 64\]"),
        ("layers", r"expected contiguous bfloat16 \[2, num_blocks, 2, 64, 64\]"),
        ("rope", r"rope.cos is torch.float32 \[64, 64\]"),
    ],
)
def test_wrong_tensors_are_named(name: str, message: str) -> None:
    config = shape_config("tiny")
    weights = empty_weights(config, "cpu", torch.float16 if name == "weights" else torch.bfloat16)
    cached = replace(config, num_layers=1) if name == "layers" else config
    cache = KVCache(cached, 1, 64, torch.float32 if name == "cache" else torch.bfloat16, "cpu")
    rope = RopeTable.build(replace(config, head_dim=128) if name == "rope" else config, 64)
    with pytest.raises(UserError, match=message):
        decode_step._check(config, weights, rope, cache, DecodeState(1, 1, torch.device("cpu")))


@pytest.mark.nvcc
def test_columns_that_warps_can_share() -> None:
    fits = decode_step.library().fits_columns
    assert [k for k in (256, 512, 768, 1024, 2048, 3072, 4096, 8192, 14336) if not fits(k)] == []
    assert not any(fits(k) for k in (128, 2112, 256 * 11, 28672))
