"""The whole engine on a GPU: the kernels write what the reference ops write, at every batch size, and repeatably."""

import inspect
import json
import pathlib
import tokenize
from array import array
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from llama3 import LLM, SamplingParams
from llama3.checkpoint import load_weights
from llama3.cli import DEMO_MODEL
from llama3.config import ModelConfig
from llama3.decode_state import DecodeState
from llama3.forward_batch import DecodeBatch, PrefillBatch
from llama3.kv_cache import KVCache
from llama3.model import Transformer
from llama3.ops import prefill_attention, select
from llama3.ops.reference import ReferenceOps
from llama3.prefill_graphs import PrefillGraphs
from llama3.rope import RopeTable
from tests.engine_helpers import poison
from tests.numerics import ROUNDING_FLOOR, assert_within_contract

pytestmark = pytest.mark.gpu

NUM_PROMPTS = 200
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
MISSION = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=32, seed=7)
BATCH_SIZES = (1, 4, 8, 16, 33, 64, 256)


@pytest.fixture(scope="module")
def reference() -> Iterator[LLM]:
    with LLM(DEMO_MODEL, device="cuda", kernels="reference", use_tqdm=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def ours() -> Iterator[LLM]:
    with LLM(DEMO_MODEL, device="cuda", kernels="auto", use_tqdm=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def truth() -> Transformer:
    """fp32 on the CPU."""
    config = ModelConfig.from_folder(DEMO_MODEL)
    weights = load_weights(DEMO_MODEL, config, "cpu", torch.float32, progress=False)
    return Transformer(config, weights, ReferenceOps(), RopeTable.build(config, 2048))


@pytest.fixture(scope="module")
def prompts(ours: LLM) -> list[list[int]]:
    """Pieces of Python source of many lengths."""
    source = "".join(inspect.getsource(module) for module in (pathlib, json, tokenize, inspect))
    tokenizer = ours.get_tokenizer()
    step = len(source) // NUM_PROMPTS
    pieces = [source[i * step : i * step + 20 + 7 * (i % 60)] for i in range(NUM_PROMPTS)]
    return [tokenizer.encode(piece) for piece in pieces]


@pytest.fixture(scope="module")
def exact_tokens(prompts: list[list[int]]) -> list[list[int]]:
    """What fp32 on the CPU writes."""
    with LLM(DEMO_MODEL, device="cpu", dtype="float32", use_tqdm=False) as llm:
        return tokens(llm, prompts, GREEDY)


def last_logits(model: Transformer, token_ids: list[int]) -> torch.Tensor:
    device = model.weights.embed.device
    cache = KVCache(model.config, 1, len(token_ids), model.weights.embed.dtype, device)
    batch = PrefillBatch.build([0], [len(token_ids)], cache.reserve([0], [len(token_ids)]), device)
    with torch.inference_mode():
        return model.prefill(torch.tensor(token_ids, device=device), batch, cache)[0].float().cpu()


def tokens(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def test_the_run_says_that_the_kernels_run(ours: LLM, reference: LLM) -> None:
    assert ours.kernels.startswith("CUDA kernels")
    assert reference.kernels == "reference ops (PyTorch), as asked"


@pytest.mark.parametrize("batch_size", [1, 8, 33, NUM_PROMPTS])
def test_greedy_tokens_equal_the_reference_ops_but_for_ties(
    ours: LLM,
    reference: LLM,
    truth: Transformer,
    exact_tokens: list[list[int]],
    prompts: list[list[int]],
    batch_size: int,
) -> None:
    """Where a token differs, fp32 must show that the two candidates are closer than bf16 rounding can tell."""
    expected = tokens(reference, prompts, GREEDY)
    got = [
        row
        for start in range(0, NUM_PROMPTS, batch_size)
        for row in tokens(ours, prompts[start : start + batch_size], GREEDY)
    ]
    ties = 0
    for prompt, theirs, our in zip(prompts, expected, got, strict=True):
        assert len(our) == len(theirs) == GREEDY.max_tokens
        if our == theirs:
            continue
        ties += 1
        same = next(i for i, pair in enumerate(zip(our, theirs, strict=True)) if pair[0] != pair[1])
        prefix = prompt + our[:same]
        exact = last_logits(truth, prefix)
        bf16_error = float((last_logits(reference.engine.model, prefix) - exact).abs().max())
        gap = float((exact[our[same]] - exact[theirs[same]]).abs())
        floor = ROUNDING_FLOOR[torch.bfloat16] * float(exact.abs().max())
        assert gap <= 4 * bf16_error + 2 * floor, (
            f"tokens {our[same]} and {theirs[same]} differ by {gap} after {prefix}"
        )
    # Flips are rare: as rare as those by which bf16 PyTorch itself departs from fp32, within three standard deviations.
    departures = sum(row != exact_row for row, exact_row in zip(expected, exact_tokens, strict=True))
    ours_departures = sum(row != exact_row for row, exact_row in zip(got, exact_tokens, strict=True))
    assert ours_departures <= departures + 3 * departures**0.5 + 3, (ties, departures, ours_departures)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@torch.inference_mode()
def test_decode_logits_are_within_the_contract(
    ours: LLM, truth: Transformer, prompts: list[list[int]], batch_size: int
) -> None:
    """Prefill, then one decode step, over poisoned caches."""
    chosen = [prompts[i % NUM_PROMPTS][: 1 + 37 * i % 150] for i in range(batch_size)]
    lens = [len(p) for p in chosen]
    slots = list(range(batch_size))

    def step(model: Transformer, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, KVCache, DecodeState]:
        cache = KVCache(model.config, batch_size, 192, dtype, device)
        poison(cache)
        batch = PrefillBatch.build(slots, lens, cache.reserve(slots, lens), device)
        model.prefill(torch.tensor([t for p in chosen for t in p], device=device), batch, cache)
        state = DecodeState(batch_size, 1, torch.device(device))
        state.token_ids[:] = torch.arange(batch_size, device=device) % 1000 + 5
        state.positions[:] = torch.tensor(cache.reserve(slots, [1] * batch_size), dtype=torch.int32, device=device)
        state.last_positions[:] = 190
        decode = DecodeBatch(state.slots, state.positions, 192)
        return model.decode_step(state.token_ids, decode, cache).float().cpu(), cache, state

    weights = ours.engine.model.weights
    rope = ours.engine.model.rope
    exact, _, _ = step(truth, torch.float32, "cpu")
    same, _, _ = step(Transformer(ours.config, weights, ReferenceOps(), rope), torch.bfloat16, "cuda")
    kernels, _ = select("cuda", ours.config, torch.bfloat16, ours.device)
    result, cache, state = step(Transformer(ours.config, weights, kernels, rope), torch.bfloat16, "cuda")
    assert_within_contract(result.bfloat16(), exact, same)
    whole = kernels.whole_step(ours.config, weights, rope, cache, state)
    if batch_size == 1 and whole is not None:  # the same step again: it appends the same key and value
        whole.launch()
        assert_within_contract(whole.logits.cpu().bfloat16(), exact, same)


@pytest.mark.parametrize("dense", [False, True], ids=["FlashAttention", "cuDNN"])
@torch.inference_mode()
def test_captured_prefills_are_within_the_contract(
    ours: LLM, truth: Transformer, prompts: list[list[int]], dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every size and number of prompts up to what graphs hold, twice, in slots that are not in order, among NaN.

    dense: whether prompts that are alone in their call go through cuDNN.
    """
    monkeypatch.setattr(prefill_attention, "DENSE_MIN_FLOPS_AGAIN", 0 if dense else torch.inf)
    model, device = ours.engine.model, ours.device
    cache = KVCache(ours.config, 8, 2048, torch.bfloat16, device)
    graphs = PrefillGraphs(model, cache, torch.cuda.graph_pool_handle())
    long = [t for p in prompts for t in p]
    for lens in ([1], [31], [32], [33], [500], [2048], [1, 1, 1], [64, 1, 63], [100] * 8, [5, 200, 7], [1], [33]):
        chosen = [long[17 * i : 17 * i + n] for i, n in enumerate(lens)]
        slots = [(3 * i + 1) % 8 for i in range(len(lens))]
        assert graphs.takes(lens, [0] * len(lens))
        poison(cache)
        got = graphs.run(array("I", [t for p in chosen for t in p]), slots, lens).clone()
        rows = zip(got, slots, chosen, strict=True)
        for logits, slot, prompt in rows:
            exact = last_logits(truth, prompt)
            same = last_logits(Transformer(ours.config, model.weights, ReferenceOps(), model.rope), prompt)
            assert_within_contract(logits.cpu(), exact, same.bfloat16())
            for kv in (cache.k, cache.v):  # [layers, slots, blocks, heads, 64, D]: tokens are blocks x 64
                tokens_of_slot = kv.unflatten(1, (8, -1))[:, slot].transpose(2, 3).flatten(1, 2)
                assert tokens_of_slot[:, : len(prompt)].isfinite().all()
                assert tokens_of_slot[:, len(prompt) :].isnan().all()
    assert not graphs.takes([2049], [0]) and not graphs.takes([1] * 9, [0] * 9) and not graphs.takes([5], [1])


@pytest.mark.parametrize("params", [GREEDY, MISSION], ids=["greedy", "top-p"])
@pytest.mark.parametrize("batch_size", [1, 40])
def test_repeats_are_equal(ours: LLM, prompts: list[list[int]], params: SamplingParams, batch_size: int) -> None:
    first = tokens(ours, prompts[:batch_size], params)
    assert all(tokens(ours, prompts[:batch_size], params) == first for _ in range(3))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_second_gpu_that_is_not_the_current_one(ours: LLM, prompts: list[list[int]]) -> None:
    """Prefills, graphs, single steps and draws go to the model's own GPU, whichever is current."""
    with LLM(DEMO_MODEL, device="cuda:1", kernels="auto", use_tqdm=False) as llm:
        assert torch.cuda.current_device() == 0
        for params in (GREEDY, MISSION, replace(MISSION, logprobs=2)):
            for chosen in (prompts[:1], prompts[:40]):
                assert tokens(llm, chosen, params) == tokens(ours, chosen, params)


def test_stops_limits_and_refills_on_the_device(ours: LLM, prompts: list[list[int]]) -> None:
    """More requests than rows, ends of every kind: each answer is what its limits allow, and nothing else."""
    with LLM(DEMO_MODEL, device="cuda", max_num_seqs=8, max_model_len=640, use_tqdm=False) as small:
        stop = tokens(small, prompts[:1], GREEDY)[0][5]
        params = [
            SamplingParams(temperature=0, max_tokens=1 + i % 40, min_tokens=min(i % 7, i % 40), stop_token_ids=[stop])
            for i in range(NUM_PROMPTS)
        ]
        outputs, again = (small.generate(prompts, params, use_tqdm=False) for _ in range(2))
    assert outputs == again
    for output, wanted in zip(outputs, params, strict=True):
        (completion,) = output.outputs
        ids = completion.token_ids
        assert len(ids) <= wanted.max_tokens
        if completion.finish_reason == "length":
            assert len(ids) == wanted.max_tokens
        else:
            assert completion.finish_reason == "stop" and len(ids) > wanted.min_tokens
            assert completion.stop_reason == (stop if ids[-1] == stop else None)
        assert stop not in ids[:-1]
