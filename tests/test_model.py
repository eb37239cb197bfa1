"""The model against transformers' LlamaForCausalLM on the same folder, and prefill and decode against each other."""

from pathlib import Path

import pytest
import torch

from llama3.checkpoint import load_weights
from llama3.config import ModelConfig
from llama3.errors import CapacityError
from llama3.forward_batch import DecodeBatch, PrefillBatch
from llama3.kv_cache import KVCache, LayerCache
from llama3.model import Transformer
from llama3.ops.reference import ReferenceOps
from llama3.rope import RopeTable
from llama3.shapes import shape_config
from llama3.weights import random_weights
from tests.engine_helpers import load_model, poison
from tests.model_folders import make_model_folder
from tests.numerics import assert_within_contract

# name: what differs from a single-file, untied, unscaled folder of schema 5 with head size 64 and ratio 2
CONFIGS = {
    "no scaling, ratio 1": {"num_key_value_heads": 4},
    "factor 8, ratio 3, sharded": {
        "rope_factor": 8, "hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2, "sharded": True,
    },
    "factor 32, tied, ratio 4": {"rope_factor": 32, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "head 128, ratio 8, schema 4": {
        "rope_factor": 8, "head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 1, "schema": 4,
    },
    "head 128, ratio 4, tied, sharded, schema 4": {
        "rope_factor": 32, "head_dim": 128, "num_key_value_heads": 1, "tie_word_embeddings": True, "sharded": True,
        "schema": 4,
    },
    "deep and narrow, no scaling, schema 4": {"num_hidden_layers": 5, "intermediate_size": 72, "schema": 4},
}  # fmt: skip


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path: Path, options: dict) -> None:
    reference = make_model_folder(tmp_path, **options)
    model = load_model(tmp_path)
    lengths = (1, 7, 64, 65, 200)
    prompts = [torch.randint(2, 320, (n,)) for n in lengths]
    cache = KVCache(model.config, len(lengths), 256, torch.float32, "cpu")
    poison(cache)
    slots = [3, 0, 4, 1, 2]
    batch = PrefillBatch.build(slots, lengths, cache.reserve(slots, lengths), "cpu")
    logits = model.logits(model.forward(torch.cat(prompts), batch, cache)).split(lengths)
    for prompt, ours in zip(prompts, logits, strict=True):
        torch.testing.assert_close(ours, reference(prompt[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("rope_factor", [None, 8, 32])
@torch.inference_mode()
def test_logits_past_position_8192(tmp_path: Path, rope_factor: int | None) -> None:
    """Where the scaling factor shows: a table built with the wrong one is still right near position 0."""
    reference = make_model_folder(tmp_path, rope_factor=rope_factor, num_hidden_layers=1)
    reference.config._attn_implementation = "sdpa"
    length = 8292
    model = load_model(tmp_path, num_positions=length)
    prompt = torch.randint(2, 320, (length,))
    cache = KVCache(model.config, 1, length, torch.float32, "cpu")
    batch = PrefillBatch.build([0], [length], cache.reserve([0], [length]), "cpu")
    ours = model.logits(model.forward(prompt, batch, cache))
    torch.testing.assert_close(ours, reference(prompt[None]).logits[0], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_prefill_in_pieces_then_decode_equals_one_forward(tmp_path: Path) -> None:
    make_model_folder(tmp_path, rope_factor=32)
    model = load_model(tmp_path)
    tokens = torch.randint(2, 320, (150,))
    whole = KVCache(model.config, 1, 150, torch.float32, "cpu")
    batch = PrefillBatch.build([0], [150], whole.reserve([0], [150]), "cpu")
    expected = model.logits(model.forward(tokens, batch, whole))

    cache = KVCache(model.config, 3, 192, torch.float32, "cpu")
    poison(cache)
    slot, done, rows = 2, 0, []
    for count in (1, 62, 1, 1, 20):  # across and onto block borders
        batch = PrefillBatch.build([slot], [count], cache.reserve([slot], [count]), "cpu")
        rows.append(model.logits(model.forward(tokens[done : done + count], batch, cache)))
        done += count
    while done < 150:
        (start,) = cache.reserve([slot], [1])
        step = DecodeBatch(torch.tensor([slot]).int(), torch.tensor([start]).int(), max_context_len=start + 1)
        rows.append(model.decode_step(tokens[done : done + 1], step, cache))
        done += 1
    torch.testing.assert_close(torch.cat(rows), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_an_idle_row_returns_zeros_and_writes_nothing(tmp_path: Path) -> None:
    make_model_folder(tmp_path)
    model = load_model(tmp_path)
    cache = KVCache(model.config, 2, 64, torch.float32, "cpu")
    cache.k.fill_(7.0)
    cache.v.fill_(7.0)
    qkv = torch.randn(2, model.config.qkv_size)
    batch = DecodeBatch(torch.tensor([0, 1]).int(), torch.tensor([-1, 0]).int(), max_context_len=1)
    out = model.ops.rope_append_attend(qkv, model.rope, cache.layer(0), batch)
    assert torch.all(out[0] == 0)
    assert torch.isfinite(out).all()
    assert torch.all(cache.k[:, 0] == 7.0)
    assert torch.all(cache.v[:, 0] == 7.0)
    assert not torch.all(cache.k[0, 1] == 7.0)


@pytest.mark.parametrize("positions", [(0, 1, 2, -1, -1), (-1, 0, 1, 2, -1), (-1, -1, 2, 1, 0), (-1,) * 5])
def test_rows_that_store_nothing_disturb_none_of_their_own_slot(positions: tuple[int, ...]) -> None:
    """Nor do they leave anything of their own there."""
    cache = LayerCache(*torch.full((2, 2, 3, 64, 8), torch.nan).unbind(), blocks_per_slot=1)
    k, v = torch.randn(2, 5, 3, 8).unbind()
    cache.write(torch.ones(5, dtype=torch.long), torch.tensor(positions), k, v)
    stored = {position: row for row, position in enumerate(positions) if position >= 0}
    for mine, new in ((cache.k, k), (cache.v, v)):
        for position, row in stored.items():
            assert torch.equal(mine[1, :, position], new[row])
        assert mine[0].isnan().all() and mine[1, :, len(stored) :].isnan().all()


def test_appending_past_the_cache_raises_and_moves_no_cursor(tmp_path: Path) -> None:
    make_model_folder(tmp_path)
    model = load_model(tmp_path)
    cache = KVCache(model.config, 2, 100, torch.float32, "cpu")
    assert cache.reserve([0, 1], [100, 98]) == [0, 0]
    with pytest.raises(CapacityError, match=r"slot 0 holds 100 tokens and cannot take 1 more: its limit is 100"):
        cache.reserve([1, 0], [1, 1])
    assert cache.lengths == [100, 98]
    cache.reset(0)
    assert cache.reserve([1, 0], [2, 1]) == [98, 0]


@torch.inference_mode()
def test_a_copied_slot_decodes_like_its_source(tmp_path: Path) -> None:
    make_model_folder(tmp_path)
    model = load_model(tmp_path)
    cache = KVCache(model.config, 3, 128, torch.float32, "cpu")
    poison(cache)
    prompt = torch.randint(2, 320, (70,))
    batch = PrefillBatch.build([2], [70], cache.reserve([2], [70]), "cpu")
    model.prefill(prompt, batch, cache)
    cache.copy_slot(2, 0)
    cache.reserve([2, 0], [1, 1])
    step = DecodeBatch(torch.tensor([2, 0]).int(), torch.tensor([70, 70]).int(), max_context_len=71)
    logits = model.decode_step(torch.tensor([5, 5]), step, cache)
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_norms_become_part_of_the_matrices_behind_them(dtype: torch.dtype) -> None:
    plain, weights = (random_weights(shape_config("tiny", num_layers=2), "cpu", dtype) for _ in range(2))
    for one, other in zip(plain.layers, weights.layers, strict=True):
        for norm, same in ((one.attn_norm, other.attn_norm), (one.mlp_norm, other.mlp_norm)):
            same.copy_(norm.uniform_(0.1, 3.0))
    matrices = [(layer.qkv, layer.gate_up) for layer in weights.layers]
    weights.fold_norms()
    weights.fold_norms()  # once is enough
    for before, after, held in zip(plain.layers, weights.layers, matrices, strict=True):
        assert after.attn_norm is None and after.mlp_norm is None
        assert after.qkv is held[0] and after.gate_up is held[1]
        assert torch.equal(after.qkv, (before.qkv.double() * before.attn_norm.double()).to(dtype))
        assert torch.equal(after.gate_up, (before.gate_up.double() * before.mlp_norm.double()).to(dtype))
        assert torch.equal(after.o, before.o) and torch.equal(after.down, before.down)
    assert len(list(weights.tensors())) == len(list(plain.tensors())) - 4


@torch.inference_mode()
def test_norms_folded_in_bf16_err_no_more(tmp_path: Path) -> None:
    """Over a few models, against fp64 over the same bf16 parameters with the norms apart."""
    token_ids, squares = torch.randint(2, 320, (100,)), {"folded": 0.0, "apart": 0.0}

    def logits(folder: Path, dtype: torch.dtype, fold: bool) -> torch.Tensor:
        config = ModelConfig.from_folder(folder)
        weights = load_weights(folder, config, "cpu", torch.bfloat16, progress=False)
        for holder in (weights, *weights.layers):
            for name, tensor in vars(holder).items():
                if isinstance(tensor, torch.Tensor):
                    setattr(holder, name, tensor.to(dtype))
        if fold:
            weights.fold_norms()
        cache = KVCache(config, 1, 128, dtype, "cpu")
        batch = PrefillBatch.build([0], [100], cache.reserve([0], [100]), "cpu")
        model = Transformer(config, weights, ReferenceOps(), RopeTable.build(config, 128))
        return model.logits(model.forward(token_ids, batch, cache)).double()

    for seed in range(6):
        folder = tmp_path / str(seed)
        make_model_folder(folder, seed=seed, num_hidden_layers=6, hidden_size=256)
        truth = logits(folder, torch.float64, fold=False)
        plain, folded = (logits(folder, torch.bfloat16, fold) for fold in (False, True))
        assert_within_contract(folded.bfloat16(), truth, plain.bfloat16())
        squares["apart"] += (plain - truth).square().mean().item()
        squares["folded"] += (folded - truth).square().mean().item()
    assert squares["folded"] < 1.1 * squares["apart"]
