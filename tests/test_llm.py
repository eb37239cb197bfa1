"""The public API on the bundled model: text in, text out, in order, repeatable, and clear about what it cannot do."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama3
from llama3 import LLM, SamplingParams, UserError, prompts
from llama3.engine import Engine
from llama3.errors import CapacityError, DeviceError, RequestError, TokenizerError
from llama3.plan import CALL_SIZES, RESERVE_FRACTION, MemoryPlan, activation_bytes
from llama3.shapes import shape_config
from tests.engine_helpers import make_sequence
from tests.model_folders import make_model_folder

DEMO = Path(llama3.__file__).parent.parent / "models" / "demo"
PROMPTS = ["def main(", "import os\n", "class Queue:\n    def put(self, item):\n", "x = [", "# A comment\n"]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO, device="cpu", dtype="float32", max_model_len=512, use_tqdm=False) as llm:
        yield llm


def texts(outputs: list[llama3.RequestOutput]) -> list[str]:
    return [completion.text for output in outputs for completion in output.outputs]


def test_greedy_text_equals_transformers(llm: LLM) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    eos_ids = model.generation_config.eos_token_id
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, GREEDY, use_tqdm=False), strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert output.prompt == prompt
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
        (completion,) = output.outputs
        assert completion.token_ids == expected.tolist()
        assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert completion.finish_reason == ("stop" if int(expected[-1]) in eos_ids else "length")
        assert completion.logprobs is None and completion.cumulative_logprob is None


def test_one_prompt_many_prompts_and_token_ids(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    expected = texts(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False))
    assert texts(llm.generate(ids, GREEDY, use_tqdm=False)) == expected
    assert texts(llm.generate([ids], GREEDY, use_tqdm=False)) == expected
    given: list[Any] = [np.array(ids), torch.tensor([ids]), [torch.tensor(ids)], {"prompt": PROMPTS[0]}]
    given += [[{"prompt_token_ids": ids, "prompt": "not this"}], {"prompt_token_ids": torch.tensor(ids)}]
    for prompt in [*given, {"prompt": PROMPTS[0], "prompt_token_ids": None}]:
        assert texts(llm.generate(prompt, GREEDY, use_tqdm=False)) == expected
    assert "".join(llm.stream({"prompt": PROMPTS[0]}, GREEDY)) == expected[0]
    assert texts(llm.generate([PROMPTS[1], ids], [GREEDY, GREEDY], use_tqdm=False))[1] == expected[0]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_a_seed_gives_the_same_text_in_any_order_and_company(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.9, top_p=0.95, seed=i, max_tokens=16) for i in range(len(PROMPTS))]
    together = texts(llm.generate(PROMPTS, params, use_tqdm=False))
    backwards = texts(llm.generate(PROMPTS[::-1], params[::-1], use_tqdm=False))
    assert backwards[::-1] == together
    assert texts(llm.generate(PROMPTS[2], params[2], use_tqdm=False)) == [together[2]]


def test_the_engine_seed_repeats_a_run_and_another_seed_changes_it() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12)

    def run(seed: int) -> list[str]:
        with LLM(DEMO, device="cpu", dtype="float32", seed=seed, use_tqdm=False) as llm:
            first = texts(llm.generate([PROMPTS[0]] * 2, params, use_tqdm=False))
            return first + texts(llm.generate(PROMPTS[0], params, use_tqdm=False))

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(set(run(1))) == 3  # unseeded requests draw differently from one another


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    (whole,) = texts(llm.generate(PROMPTS[2], GREEDY, use_tqdm=False))
    assert len(whole) > 12
    stop = whole[7:10]
    params = SamplingParams(temperature=0, max_tokens=24, stop=["never this", stop])
    (output,) = llm.generate(PROMPTS[2], params, use_tqdm=False)
    (completion,) = output.outputs
    assert completion.text == whole[: whole.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) < 24
    assert "".join(llm.stream(PROMPTS[2], params)) == completion.text


def test_any_temperature_above_zero_is_as_good_as_greedy_near_it(llm: LLM) -> None:
    expected = texts(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    for temperature in (1e-37, 1e-40, 1e-60, 1e-300):
        params = SamplingParams(temperature=temperature, max_tokens=24, top_p=0.9)
        assert texts(llm.generate(PROMPTS, params, use_tqdm=False)) == expected


def test_stop_strings_wait_for_min_tokens(llm: LLM) -> None:
    ids = llm.generate(PROMPTS[2], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    pieces = [llm.get_tokenizer().decode([token]) for token in ids]
    newlines = [i for i, piece in enumerate(pieces) if "\n" in piece]
    early, later = newlines[0], newlines[1]
    for min_tokens, at in ((0, early), (early, early), (early + 1, later)):
        params = SamplingParams(temperature=0, max_tokens=24, min_tokens=min_tokens, stop="\n")
        (completion,) = llm.generate(PROMPTS[2], params, use_tqdm=False)[0].outputs
        assert completion.token_ids == ids[: at + 1] and completion.stop_reason == "\n"
        assert completion.text == "".join(pieces[:at]) + pieces[at].split("\n")[0]


def test_stop_token_ids_and_ignore_eos(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    ids = output.outputs[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[ids[3]])
    (stopped,) = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs
    assert stopped.token_ids == ids[: ids.index(ids[3]) + 1]
    assert stopped.text == llm.get_tokenizer().decode(ids[: ids.index(ids[3])])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", ids[3])


def test_chat_stops_at_the_end_of_the_turn_unless_told_not_to(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Write a function named add"}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)
    (completion,) = output.outputs
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert output.prompt_token_ids == expected
    assert completion.finish_reason == "stop" and completion.stop_reason is None
    assert "<|" not in completion.text
    ignoring = SamplingParams(temperature=0, max_tokens=len(completion.token_ids) + 5, ignore_eos=True)
    (longer,) = llm.chat(messages, ignoring, use_tqdm=False)[0].outputs
    assert longer.token_ids[: len(completion.token_ids)] == completion.token_ids
    assert longer.finish_reason == "length"
    begun = [*messages, {"role": "assistant", "content": "def add("}]
    how = {"continue_final_message": True, "chat_template_kwargs": {"add_generation_prompt": False}}
    (continued,) = llm.chat(begun, GREEDY, use_tqdm=False, **how)
    assert llm.get_tokenizer().decode(continued.prompt_token_ids).endswith("def add(")
    both = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [o.prompt_token_ids for o in both] == [expected, expected]


def test_stream_pieces_join_to_the_text(llm: LLM) -> None:
    pieces = list(llm.stream(PROMPTS[2], GREEDY))
    assert "".join(pieces) == texts(llm.generate(PROMPTS[2], GREEDY, use_tqdm=False))[0]
    assert len(pieces) > 5


def test_an_abandoned_stream_leaves_the_engine_usable(llm: LLM) -> None:
    expected = texts(llm.generate(PROMPTS[1], GREEDY, use_tqdm=False))
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    with pytest.raises(RequestError, match="generating already"):
        llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    stream.close()
    assert texts(llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)) == expected


@pytest.mark.parametrize("where", ["llama3.engine.Runner", "llama3.engine.Engine.add", "llama3.llm.tqdm"])
def test_an_interruption_leaves_the_engine_usable(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with LLM(DEMO, device="cpu", dtype="float32", use_tqdm=False) as llm:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, interrupt)
            llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
        assert len(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == GREEDY.max_tokens


def test_a_stream_cannot_go_on_when_the_model_is_closed() -> None:
    llm = LLM(DEMO, device="cpu", dtype="float32", use_tqdm=False)
    stream = llm.stream(PROMPTS[2], GREEDY)
    next(stream)
    weights = weakref.ref(llm.engine.model.weights)
    llm.close()
    gc.collect()
    assert weights() is None
    with pytest.raises(RequestError, match="this LLM is closed"):
        list(stream)


def test_generating_is_spared_collections_of_what_was_there_before(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, step = [], Engine.step

    def watched(engine: Engine) -> list:
        frozen.append(gc.get_freeze_count())
        return step(engine)

    monkeypatch.setattr(Engine, "step", watched)
    llm.generate(PROMPTS[0], SamplingParams(max_tokens=4))
    assert gc.get_freeze_count() == 0
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=4))
    next(stream)
    stream.close()
    assert gc.get_freeze_count() == 0 and len(frozen) >= 5 and min(frozen) > 0


def test_logprobs_and_n(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=4, n=3, max_tokens=6, logprobs=2)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) > 1
    for completion in output.outputs:
        assert completion.logprobs is not None and completion.cumulative_logprob is not None
        assert len(completion.logprobs) == len(completion.token_ids) == 6
        drawn = [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(drawn))
        for step, token in zip(completion.logprobs, completion.token_ids, strict=True):
            assert len(step) in (2, 3)
            assert sorted(entry.rank for entry in step.values())[:2] == [1, 2]
            assert step[token].decoded_token == llm.get_tokenizer().decode([token], skip_special_tokens=False)


def test_default_parameters_come_from_the_folder(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p) == (0.6, 0.9)


def test_max_tokens_none_fills_the_context() -> None:
    with LLM(DEMO, device="cpu", dtype="float32", max_model_len=40, use_tqdm=False) as llm:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 40


def test_stop_ids_that_the_model_cannot_draw_and_any_min_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    stop_ids = settings["eos_token_id"]
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [*stop_ids, 128009]}))
    with LLM(folder, device="cpu", dtype="float32", max_model_len=400, use_tqdm=False) as llm:
        for min_tokens, top_k in ((396, 0), (2**31, 2**31), (2**64, 2**64)):
            params = SamplingParams(temperature=0.9, seed=1, min_tokens=min_tokens, max_tokens=None, top_k=top_k)
            (completion,) = llm.generate([5, 6, 7, 8], params, use_tqdm=False)[0].outputs
            assert len(completion.token_ids) == 396 and not set(completion.token_ids) & set(stop_ids)


def test_closing_gives_the_memory_back() -> None:
    llm = LLM(DEMO, device="cpu", use_tqdm=False)
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert llm.engine.cache is not None
    held = [weakref.ref(t) for t in (llm.engine.cache.k, *llm.engine.model.weights.tensors())]
    llm.close()
    gc.collect()
    assert not any(reference() is not None for reference in held)
    llm.close()  # again is harmless
    with pytest.raises(RequestError, match="this LLM is closed"):
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)


BAD_PROMPTS = [
    ("", "prompt 1: the prompt is an empty string"),
    ([], "prompt 1: the prompt has no token ids"),
    ([5, 10**6], "prompt 1: token id 1000000 is outside the vocabulary of 2048"),
    ([5, -1], "prompt 1: token id -1 is outside the vocabulary"),
    ([5, 2**40], "prompt 1: token id 1099511627776 is outside the vocabulary"),
    ([5, True], "prompt 1: the prompt must be a string or token ids, but it holds True"),
    (np.array([5, 2048]), "prompt 1: token id 2048 is outside the vocabulary of 2048"),
    ([5, "x"], "prompt 1: the prompt must be a string or token ids, but it holds 'x'"),
    ([5] * 512, "prompt 1: the prompt has 512 tokens and leaves no room to generate: the limit .* is 512"),
    (7.5, "prompt 1: the prompt must be a string or a list of token ids, not float"),
    (None, "prompt 1: the prompt must be a string or a list of token ids, not NoneType"),
    (b"x", "prompt 1: the prompt must be a string or a list of token ids, not bytes"),
    (
        {"text": "x"},
        r"prompt 1: the prompt is a dictionary of \['text'\], with .* under neither 'prompt_token_ids' nor",
    ),
    ({"prompt": {"prompt": "x"}}, r"prompt 1: the prompt is a dictionary of \['prompt'\]"),
    ({"prompt": ["a", "b"]}, "prompt 1: the prompt must be a string or token ids, but it holds 'a'"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_a_bad_prompt_is_named_by_its_index(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(["x = 1", prompt], GREEDY, use_tqdm=False)  # type: ignore[list-item]


def test_a_bad_prompt_can_be_recorded_while_the_others_run(llm: LLM) -> None:
    given: list[Any] = [PROMPTS[0], "", [5] * 600, None]
    outputs = llm.generate(given, GREEDY, use_tqdm=False, on_error="record")
    assert texts(outputs[:1]) == texts(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False))
    assert [o.error is None for o in outputs] == [True, False, False, False]
    assert "600 tokens" in (outputs[2].error or "") and "NoneType" in (outputs[3].error or "")
    assert outputs[1].outputs == [] and [o.request_id for o in outputs] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("prompt", [{"prompt_token_ids": []}, {"prompt": ["a", "b"]}, {"prompt": b"x"}, {"text": "x"}])
def test_a_dictionary_is_one_prompt_whatever_it_holds(llm: LLM, prompt: dict) -> None:
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False, on_error="record")
    assert output.error and output.outputs == []


def test_a_bad_conversation_is_named_by_its_index_or_recorded(llm: LLM) -> None:
    good: list[Any] = [{"role": "user", "content": "Write a function named add"}]
    bad: list[Any] = [{"role": "user", "content": None}]
    surrogate = [{"role": "user", "content": "\ud800"}]
    with pytest.raises(RequestError, match=r"prompt 1: message 0 \(user\) has content None"):
        llm.chat([good, bad], GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=r"^message 0 \(user\) has content None"):
        llm.chat_prompt(bad)
    with pytest.raises(RequestError, match="prompt 0: the chat template makes nothing of these messages"):
        llm.chat(good, GREEDY, use_tqdm=False, chat_template="{# nothing #}")
    (alone,) = llm.chat(good, GREEDY, use_tqdm=False)
    outputs = llm.chat([bad, good, surrogate], GREEDY, use_tqdm=False, on_error="record")
    assert [bool(output.error) for output in outputs] == [True, False, True]
    assert outputs[1].prompt_token_ids == alone.prompt_token_ids and texts(outputs[1:2]) == texts([alone])
    assert "lone surrogate" in (outputs[2].error or "")


def test_texts_are_encoded_together_and_only_bad_ones_stay(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "TEXTS_AT_ONCE", 2)
    tokenizer = llm.get_tokenizer()
    given = ["x = 1", [5, 6], "", "y", "\ud800", "z", "é"]
    encode = tokenizer.encode
    encoded = prompts.encode_texts(given, tokenizer)
    surrogate = encoded.pop(4)
    assert encoded == [encode("x = 1"), [5, 6], "", encode("y"), encode("z"), encode("é")]
    assert isinstance(surrogate, RequestError)
    assert prompts.encode_texts(given, None) == given
    outputs = llm.generate(given, GREEDY, use_tqdm=False, on_error="record")
    assert [bool(output.error) for output in outputs] == [False, False, True, False, True, False, False]
    assert [output.prompt for output in outputs] == ["x = 1", None, "", "y", "\ud800", "z", "é"]
    assert "lone surrogate" in (outputs[4].error or "")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(["a", "b"], [GREEDY]), "2 prompts came with 1 sampling parameters"),
        (lambda llm: llm.generate("a", SamplingParams(stop_token_ids=[9999])), "stop token id 9999 is outside"),
        (lambda llm: llm.generate("a", SamplingParams(logprobs=5000)), "logprobs is 5000, more than the vocabulary"),
        (lambda llm: llm.generate("a", on_error="ignore"), "on_error='ignore' must be 'raise' or 'record'"),
        (lambda llm: list(llm.stream("a", SamplingParams(n=2))), "stream gives one answer, but n is 2"),
        (lambda llm: llm.generate(5), "prompts must be strings or lists of token ids, not int"),
        (lambda llm: llm.generate(b"x"), "prompts must be strings or lists of token ids, not bytes"),
        (lambda llm: llm.generate(torch.tensor(5)), "prompts must be strings or lists of token ids, not int"),
        (lambda llm: list(llm.stream(["a", "b"])), "stream takes one prompt, not 2"),
        (lambda llm: llm.chat({"role": "user", "content": "a"}), "messages must be a list .* put it into a list"),
    ],
)
def test_wrong_calls_say_what_is_wrong(llm: LLM, call: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call(llm)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "tpu:0"}, DeviceError, "device 'tpu:0' is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "mps"}, DeviceError, "device 'mps' is not supported"),
        ({"device": "cpu", "kernels": "cuda"}, DeviceError, "kernels='cuda' cannot run here: the device is a CPU"),
        ({"device": "cpu", "kernels": "fast"}, DeviceError, "kernels='fast' is unknown"),
        ({"dtype": "int3"}, DeviceError, "dtype 'int3' is unknown; use 'auto' or one of bfloat16"),
        ({"max_model_len": 0}, RequestError, "max_model_len=0 must be between 1 and .* 131072"),
        ({"max_model_len": 200000}, RequestError, "max_model_len=200000 must be between 1 and .* 131072"),
        ({"max_num_seqs": 0}, RequestError, "max_num_seqs=0 must be at least 1"),
        ({"max_num_batched_tokens": -5}, RequestError, "max_num_batched_tokens=-5 must be at least 1"),
        ({"seed": 2**63}, RequestError, r"seed=9223372036854775808 must be in \[0, 2\^63\)"),
    ],
)
def test_wrong_settings_say_what_is_wrong(arguments: dict, error: type[UserError], message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(DEMO, **({"device": "cpu", "use_tqdm": False} | arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match=r"device 'cuda' is not available: this PyTorch is built for CPUs|finds no"):
        LLM(DEMO, device="cuda")


def test_a_job_that_does_not_fit_is_refused_with_what_would_fit(llm: LLM) -> None:
    plan = MemoryPlan(llm.config, torch.bfloat16, free=2**30, weights=0, num_batched_tokens=2048)
    with pytest.raises(CapacityError, match=r"not enough memory for 64 sequences of 65536 tokens") as caught:
        plan.check(64, 65536)
    rows = plan.largest_num_rows(65536, 64)
    length = plan.largest_max_len(64, 65536)
    assert f"max_num_seqs={rows} " in str(caught.value) and f"max_model_len={length} " in str(caught.value)
    plan.check(rows, 65536)
    plan.check(64, length)
    with pytest.raises(CapacityError, match="what fits: nothing: a smaller model or more memory is needed"):
        MemoryPlan(llm.config, torch.bfloat16, free=2**30, weights=2**31, num_batched_tokens=2048).check(2, 128)
    with pytest.raises(CapacityError, match=r"what fits: max_num_seqs=\d+ at this length$"):
        plan.check(2**16, 32)  # shorter than a block of the cache
    both = plan.largest_max_len(1, 2**22)
    with pytest.raises(CapacityError, match=f"what fits: max_num_seqs=1 with max_model_len={both}$"):
        plan.check(2**16, 2**22)
    assert plan.fits(1, both)
    for too_much in ((rows + 1, 65536), (64, length + 64)):
        with pytest.raises(CapacityError):
            plan.check(*too_much)


def test_prefill_calls_are_as_large_as_memory_allows_beside_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(DEMO, device="cpu", max_model_len=512, max_num_seqs=128, use_tqdm=False) as llm:
        sizes = CALL_SIZES["cuda"]
        monkeypatch.setattr(llm, "_call_sizes", sizes)
        free = {}  # with which 128 rows and calls of a size just fit
        for size in sizes:
            needed = MemoryPlan(llm.config, llm.dtype, 0, 0, size).needed(128, 512)
            free[size] = int(needed / (1 - RESERVE_FRACTION)) + 2

        def budget(num_rows: int, free_bytes: int) -> int:
            monkeypatch.setattr(llm.engine, "reclaimable_memory", lambda: free_bytes)
            llm._prepare([make_sequence(i, [5, 6, 7]) for i in range(num_rows)])
            return llm.engine.scheduler.token_budget

        assert [budget(128, free[size]) for size in sizes] == list(sizes)
        assert budget(128, free[16384] - 4) == 8192 and budget(128, 2**40) == sizes[0]
        # The cache stays for a smaller job, so it counts.
        assert budget(1, free[4096]) == 4096
        with pytest.raises(CapacityError, match="not enough memory for 128 sequences of 512 tokens"):
            budget(128, free[2048] - 4)


def test_no_more_rows_than_the_ops_take(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = texts(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    monkeypatch.setattr(llm.engine.model.ops, "max_rows", lambda config, device: 3)
    assert texts(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert llm.engine.scheduler.num_places == 3


def test_activations_are_counted_at_their_peak() -> None:
    config = shape_config("1b")  # hidden size 2048, qkv 3072, feed-forward 8192, 32 heads, vocabulary 128256
    per_token = activation_bytes(config, 1, 0, torch.bfloat16)
    assert per_token == 2 * (3 * 2048 + 3072 + 4 * 8192) + 24 + 4 * 32
    assert activation_bytes(config, 32768, 256, torch.bfloat16) == 32768 * per_token + 256 * 128256 * 18


def test_without_a_tokenizer_generation_config_says_too_what_ends_an_answer(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path)
    (free,) = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, eos_token_id=-1).tolist()
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, free[6]]}))
    with LLM(tmp_path, device="cpu", use_tqdm=False) as llm:
        (completion,) = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0].outputs
    assert completion.token_ids == free[3 : free.index(free[6], 3) + 1] and completion.finish_reason == "stop"


def test_a_folder_without_tokenizer_takes_token_ids_only(tmp_path: Path) -> None:
    make_model_folder(tmp_path, rope_factor=8)
    with LLM(tmp_path, device="cpu", use_tqdm=False) as llm:
        (output,) = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)
        assert output.outputs[0].text == "" and output.outputs[0].token_ids
        for call in (lambda: llm.generate("text", GREEDY), lambda: llm.chat([{"role": "user", "content": "x"}])):
            with pytest.raises((RequestError, TokenizerError), match=r"no tokenizer\.json: give prompts as token ids"):
                call()
        with pytest.raises(RequestError, match="stop strings need a tokenizer"):
            llm.generate([5], SamplingParams(stop="x"))
