"""The persistent decode step against the same step in fp32 PyTorch, over caches full of NaN where unused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llama3.config import ModelConfig
from llama3.decode_state import DecodeState
from llama3.kv_cache import BLOCK_SIZE, KVCache
from llama3.ops import sampling
from llama3.ops.decode_step import DecodeStep
from llama3.rope import RopeTable
from llama3.sampling import sample_tokens
from llama3.shapes import shape_config
from llama3.weights import ModelWeights, gate_up_groups, random_weights

pytestmark = pytest.mark.gpu

NEVER = 1 << 30
SLOT, NUM_SLOTS = 1, 2


def config(hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, tied: bool = True) -> ModelConfig:
    return replace(
        shape_config("tiny", 3),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=4096,
        tie_word_embeddings=tied,
    )


CONFIGS = {
    "d64 ratio 1": config(512, 1024, 4, 4, 64),
    "d64 ratio 4": config(512, 1024, 8, 2, 64),
    "d64 ratio 8": config(512, 1024, 16, 2, 64),
    "d128 ratio 3, untied": config(1024, 2048, 6, 2, 128, tied=False),
    "d128 ratio 4": config(1024, 2048, 8, 2, 128),
    "columns of 3 and 7 units": config(768, 3584, 32, 8, 64),
    "as 8B: 8 kv heads, columns of 2 units": config(4096, 14336, 32, 8, 128),
}


class Rig:
    """A model, a slot with `context` tokens among NaN, and a decode step over them."""

    def __init__(self, model: ModelConfig, max_len: int = 256, folded: bool = True) -> None:
        torch.manual_seed(0)
        self.config, device = model, torch.device("cuda")
        self.weights = random_weights(model, device, torch.bfloat16)
        for layer in self.weights.layers:
            layer.attn_norm.uniform_(0.5, 1.5)
            layer.mlp_norm.uniform_(0.5, 1.5)
        self.weights.final_norm.uniform_(0.5, 1.5)
        if folded:
            self.weights.fold_norms()
        self.rope = RopeTable.build(model, max_len, device)
        self.cache = KVCache(model, NUM_SLOTS, max_len, torch.bfloat16, device)
        self.state = DecodeState(1, 2, device)
        self.state.slots.fill_(SLOT)
        self.state.last_positions.fill_(NEVER)
        self.state.first_stop_positions.fill_(NEVER)
        self.step = DecodeStep(model, self.weights, self.rope, self.cache, self.state)

    def fill(self, context: int, token: int = 17) -> None:
        for cache in (self.cache.k, self.cache.v):
            cache.fill_(math.nan)
            shape = (self.config.num_layers, self.config.num_kv_heads, context, self.config.head_dim)
            self.slot_rows(cache)[:, :, :context] = torch.randn(shape, device="cuda").to(cache.dtype)
        self.place(context, token)

    def place(self, position: int, token: int) -> None:
        self.state.token_ids.fill_(token)
        self.state.positions.fill_(position)

    def slot_rows(self, cache: torch.Tensor) -> torch.Tensor:
        """The slot's tokens, [layers, kv heads, tokens, D]: a view for 2 or more blocks of one head is impossible, so
        blocks are visited through strides."""
        n = self.cache.blocks_per_slot
        return _TokenView(cache[:, SLOT * n : (SLOT + 1) * n])  # type: ignore[return-value]

    def truth(
        self, context: int, dtype: torch.dtype, token: int = 17
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits fp32 [V], and the new token's k and v [layers, kv heads, D], computed in `dtype`."""
        keys, values = (self.slot_rows(c)[:, :, :context].to(dtype) for c in (self.cache.k, self.cache.v))
        return reference_step(self.config, self.weights, self.rope, keys, values, token, context, dtype)


class _TokenView:
    """[layers, blocks, heads, 64, D] indexed as [layers, heads, tokens, D]: all layers and heads, a run of tokens."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __getitem__(self, index: tuple[slice, slice, slice]) -> torch.Tensor:
        tokens = torch.arange(*index[2].indices(self.blocks.shape[1] * BLOCK_SIZE), device=self.blocks.device)
        return self.blocks[:, tokens // BLOCK_SIZE, :, tokens % BLOCK_SIZE].permute(1, 2, 0, 3)

    def __setitem__(self, index: tuple[slice, slice, slice], new: torch.Tensor) -> None:
        tokens = torch.arange(*index[2].indices(self.blocks.shape[1] * BLOCK_SIZE), device=self.blocks.device)
        self.blocks[:, tokens // BLOCK_SIZE, :, tokens % BLOCK_SIZE] = new.permute(2, 0, 1, 3)


def reference_step(
    model: ModelConfig,
    weights: ModelWeights,
    rope: RopeTable,
    keys: torch.Tensor,
    values: torch.Tensor,
    token: int,
    position: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        scaled = (wide * torch.rsqrt(wide.square().mean() + model.rms_norm_eps)).to(dtype)
        return scaled if weight is None else weight.to(dtype) * scaled

    def rotate(heads: torch.Tensor) -> torch.Tensor:
        cos, sin = rope.cos[position], rope.sin[position]
        first, second = heads.float().chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(dtype)

    group = model.num_heads // model.num_kv_heads
    x = weights.embed[token].to(dtype)
    new_keys, new_values = [], []
    for index, layer in enumerate(weights.layers):
        heads = (layer.qkv.to(dtype) @ norm(x, layer.attn_norm)).view(-1, model.head_dim)
        q, k, v = heads.split([model.num_heads, model.num_kv_heads, model.num_kv_heads])
        q, k = rotate(q).view(model.num_kv_heads, group, -1), rotate(k)
        new_keys.append(k)
        new_values.append(v)
        all_keys, all_values = torch.cat((keys[index], k[:, None]), 1), torch.cat((values[index], v[:, None]), 1)
        scores = torch.einsum("hgd,htd->hgt", q, all_keys).float() / math.sqrt(model.head_dim)
        attended = torch.einsum("hgt,htd->hgd", scores.softmax(-1).to(dtype), all_values)
        x = x + layer.o.to(dtype) @ attended.flatten()
        gate, up = gate_up_groups(layer.gate_up).to(dtype).matmul(norm(x, layer.mlp_norm)).unbind(1)
        x = x + layer.down.to(dtype) @ (F.silu(gate) * up).flatten()
    logits = weights.lm_head.to(dtype) @ norm(x, weights.final_norm)
    return logits.float(), torch.stack(new_keys), torch.stack(new_values)


def relative_error(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_appended_token_against_fp32(name: str, folded: bool) -> None:
    # Tiles of 64 tokens: within one round of a warp, in two rounds of one block, and in two to six a split.
    rig = Rig(CONFIGS[name], max_len=5760, folded=folded)
    for context in (0, 1, 63, 64, 65, 127, 128, 191, 256, 320, 460, 511, 513, 1000, 2112, 5500):
        rig.fill(context)
        truth, new_k, new_v = rig.truth(context, torch.float32)
        same_precision = rig.truth(context, torch.bfloat16)[0]
        rig.step.logits.fill_(math.nan)
        rig.step.launch()
        error, allowed = relative_error(rig.step.logits[0], truth), relative_error(same_precision, truth)
        assert error <= 2 * allowed, f"context {context}: {error:.2e}, bf16 PyTorch {allowed:.2e}"
        for cache, new in ((rig.cache.k, new_k), (rig.cache.v, new_v)):
            stored = rig.slot_rows(cache)[:, :, context : context + 1][:, :, 0]
            assert relative_error(stored, new) < 0.02, context
            assert bool(rig.slot_rows(cache)[:, :, context + 1 :].isnan().all()), "wrote past the new token"
            assert bool(cache[:, : rig.cache.blocks_per_slot].isnan().all()), "wrote into another slot"


def test_long_context() -> None:
    rig = Rig(CONFIGS["d128 ratio 3, untied"], max_len=40064)
    rig.fill(40000)
    truth = rig.truth(40000, torch.float32)[0]
    same_precision = rig.truth(40000, torch.bfloat16)[0]
    rig.step.launch()
    assert relative_error(rig.step.logits[0], truth) <= 2 * relative_error(same_precision, truth)


@pytest.mark.parametrize("context", [0, 60, 250, 900])
def test_repeats_are_bitwise_equal_and_steps_chain(context: int) -> None:
    rig = Rig(CONFIGS["d64 ratio 4"], max_len=1024)
    rig.fill(context)
    one_by_one, logits = [], []
    for _ in range(10):
        drawn = torch.full((1,), -7, device="cuda")
        rig.step.launch(drawn)
        one_by_one.append(int(drawn[0]))
        logits.append(rig.step.logits.clone())
        assert one_by_one[-1] == int(logits[-1].argmax())
    assert int(rig.state.positions[0]) == context + 10 and int(rig.state.token_ids[0]) == one_by_one[-1]
    for launches in (1, 2):
        rig.place(context, 17)
        drawn = torch.full((launches, 10 // launches), -7, device="cuda")
        for row in drawn:
            rig.step.launch(row)
        assert drawn.flatten().tolist() == one_by_one
        assert torch.equal(rig.step.logits, logits[-1])


def test_chained_tokens_are_those_of_the_reference() -> None:
    rig = Rig(CONFIGS["d64 ratio 4"], max_len=256)
    rig.fill(40)
    drawn = torch.zeros(30, dtype=torch.int64, device="cuda")
    rig.step.launch(drawn)
    token = 17
    for i, got in enumerate(drawn.tolist()):
        logits = rig.truth(40 + i, torch.float32, token)[0]
        assert float(logits.max() - logits[got]) < 0.02, f"step {i} is no tie"
        token = got


def test_captured_in_a_graph() -> None:
    rig = Rig(CONFIGS["d64 ratio 4"], max_len=256)
    rig.fill(30)
    eager = torch.zeros(12, dtype=torch.int64, device="cuda")
    rig.step.launch(eager)
    torch.cuda.synchronize()
    rig.place(30, 17)
    drawn = torch.zeros(4, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rig.step.launch(drawn)
    tokens = []
    for _ in range(3):
        graph.replay()
        tokens += drawn.tolist()
    assert tokens == eager.tolist()


def set_rules(rig: Rig, seed: int = 0, **rules: float) -> None:
    sampling = rig.state.sampling
    for name, value in ({"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | rules).items():
        getattr(sampling, name).fill_(value)
    sampling.seed.fill_(seed * 0x123456789)
    sampling.request.fill_(3)
    sampling.sample.fill_(seed % 2)


def test_sampling_draws_what_the_reference_draws() -> None:
    rig = Rig(CONFIGS["d64 ratio 4"], max_len=256)
    for seed in range(20):
        rig.fill(20)
        set_rules(rig, seed)
        drawn = torch.zeros(1, dtype=torch.int64, device="cuda")
        rig.step.launch(drawn)
        expected = sample_tokens(rig.step.logits, rig.state.sampling, torch.tensor([21], device="cuda"))
        assert drawn.tolist() == expected.tolist()


RULES = [
    {"top_p": 0.9},
    {"top_p": 0.9, "temperature": 0.6},
    {"top_p": 0.1, "temperature": 1.5},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_p": 0.5, "min_p": 0.2},
    {"top_k": 1},
    {"top_k": 5, "temperature": 2.0},
    {"top_k": 100},
    {"top_k": 100, "min_p": 0.1},
]


@pytest.mark.parametrize("sharpness", [1.0, 8.0])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_filters_draw_what_the_sampling_kernel_draws(rules: dict[str, float], sharpness: float) -> None:
    rig = Rig(CONFIGS["d64 ratio 4"], max_len=256)
    rig.weights.final_norm.mul_(sharpness)
    rig.fill(20)
    position = torch.tensor([21], dtype=torch.int32, device="cuda")
    for seed in range(20):
        rig.place(20, 17)
        set_rules(rig, seed, **rules)
        drawn = torch.full((1,), -7, device="cuda")
        rig.step.launch(drawn)
        assert drawn.tolist() == sampling.sample(rig.step.logits, rig.state.sampling, position).tolist(), seed


@pytest.mark.parametrize("rules", [{}, {"top_p": 0.3}], ids=str)
def test_filtered_steps_chain(rules: dict[str, float]) -> None:
    rig = Rig(CONFIGS["d64 ratio 4"], max_len=256)
    rig.fill(20)
    set_rules(rig, 5, **rules)
    one_by_one = torch.full((24, 1), -7, device="cuda")
    for row in one_by_one:
        rig.step.launch(row)
    assert len(set(one_by_one.flatten().tolist())) > 8
    rig.place(20, 17)
    chained = torch.full((24,), -7, device="cuda")
    rig.step.launch(chained)
    assert chained.tolist() == one_by_one.flatten().tolist()


def test_logits_that_are_not_finite() -> None:
    rig = Rig(CONFIGS["d64 ratio 4"], max_len=256)
    rig.fill(20)
    set_rules(rig, 1, top_p=0.9)
    rig.weights.lm_head[99] = math.nan
    rig.weights.lm_head[1234] = math.nan
    drawn = torch.full((1,), -7, device="cuda")
    rig.step.launch(drawn)
    assert drawn.tolist() == [99]


def test_stop_token_and_last_position_make_the_row_idle() -> None:
    rig = Rig(CONFIGS["d64 ratio 4"], max_len=256)
    rig.fill(20)
    drawn = torch.zeros(3, dtype=torch.int64, device="cuda")
    rig.step.launch(drawn)
    first, second = drawn.tolist()[:2]

    def position_after(num_steps: int) -> int:
        rig.place(20, 17)
        rig.step.launch(torch.zeros(num_steps, dtype=torch.int64, device="cuda"))
        return int(rig.state.positions[0])

    rig.state.stop_ids[0, 0] = first
    rig.state.first_stop_positions.fill_(0)
    assert position_after(1) == -1 and position_after(3) == -1
    rig.state.first_stop_positions.fill_(22)
    if second != first:
        assert position_after(2) == 22
    rig.state.stop_ids.fill_(-1)
    rig.state.last_positions.fill_(21)
    assert position_after(1) == 21 and position_after(2) == -1


def test_idle_row_and_full_slot_change_nothing() -> None:
    rig = Rig(CONFIGS["d64 ratio 4"], max_len=128)
    rig.fill(120)
    before = rig.cache.k.clone()
    drawn = torch.full((9,), -7, device="cuda")
    rig.step.launch(drawn)  # nine tokens from position 120 do not fit into 128
    rig.state.positions.fill_(-1)
    rig.step.launch(drawn[:1])
    rig.step.launch()
    torch.cuda.synchronize()
    assert drawn.tolist() == [-7] * 9 and int(rig.state.positions[0]) == -1
    assert torch.equal(before.nan_to_num(-1), rig.cache.k.nan_to_num(-1))
