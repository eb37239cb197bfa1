"""The model against transformers' LlamaForCausalLM on the same folder, and prefill and decode against each other."""

from pathlib import Path

import pytest
import torch

from llama3.errors import CapacityError
from llama3.forward_batch import DecodeBatch, PrefillBatch
from llama3.kv_cache import KVCache
from tests.engine_helpers import load_model, poison
from tests.model_folders import make_model_folder

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
