"""The engine on token ids: equal to transformers' generate, and to itself in any company."""

import random
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3.engine import STEPS_WHILE_OTHERS_WAIT, Engine
from llama3.model import Transformer
from llama3.runner import GRAPH_STEPS, StepOptions
from llama3.sampling_params import SamplingParams
from llama3.sequence import Sequence
from tests.engine_helpers import GREEDY_64, Launch, launch_as_on_a_gpu, load_model, make_sequence, run, run_to_end
from tests.model_folders import make_model_folder

VOCAB = 320


@pytest.fixture(scope="module")
def folder_and_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_model_folder(folder, rope_factor=32, tie_word_embeddings=True, num_key_value_heads=1)


@pytest.fixture(scope="module")
def model(folder_and_reference: tuple[Path, object]) -> Iterator[Transformer]:
    yield load_model(folder_and_reference[0])


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize(("num_rows", "token_budget"), [(6, 2048), (2, 2048), (6, 50)])
def test_greedy_tokens_equal_transformers(
    folder_and_reference: tuple[Path, object], model: Transformer, num_rows: int, token_budget: int
) -> None:
    """Ragged prompts in one batch, in fewer rows than sequences, and prefilled in pieces."""
    reference = folder_and_reference[1]
    prompts = prompts_of((1, 2, 63, 64, 65, 200))
    ours = run(model, [make_sequence(i, p) for i, p in enumerate(prompts)], num_rows, token_budget)
    for prompt, tokens in zip(prompts, ours, strict=True):
        expected = reference.generate(  # type: ignore[attr-defined]
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert tokens == expected[0, len(prompt) :].tolist()


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 90),  # prompt length
        st.integers(1, 24),  # max_tokens
        st.booleans(),  # greedy, or sampled with a seed of its own
        st.integers(0, 2),  # how many stop ids
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS, num_rows=st.integers(1, 5), token_budget=st.integers(16, 200), data=st.data())
def test_a_request_alone_and_in_any_company_gives_the_same_tokens(
    model: Transformer,
    requests: list[tuple[int, int, bool, int]],
    num_rows: int,
    token_budget: int,
    data: st.DataObject,
) -> None:
    prompts = prompts_of(tuple(n for n, *_ in requests), seed=len(requests))

    def sequence(i: int) -> Sequence:
        _, max_tokens, greedy, num_stops = requests[i]
        params = SamplingParams(temperature=0 if greedy else 0.9, top_p=0.95, seed=i, max_tokens=max_tokens)
        return make_sequence(i, prompts[i], params, frozenset(range(40, 40 + 60 * num_stops)))

    alone = [run(model, [sequence(i)], 1, max_stop_ids=120)[0] for i in range(len(requests))]
    order = data.draw(st.permutations(range(len(requests))))
    together = run(model, [sequence(i) for i in order], num_rows, token_budget, max_stop_ids=120)
    ahead = run(model, [sequence(i) for i in order], num_rows, token_budget, max_stop_ids=120, launch_ahead=True)
    assert dict(zip(order, together, strict=True)) == dict(enumerate(alone))
    assert ahead == together
    for (_, max_tokens, _, num_stops), tokens in zip(requests, alone, strict=True):
        stops = set(range(40, 40 + 60 * num_stops))
        ended_by_stop = tokens[-1] in stops
        assert len(tokens) == max_tokens or ended_by_stop
        assert not stops & set(tokens[:-1])


def test_min_tokens_keeps_stop_tokens_away_and_leaves_the_rest(model: Transformer) -> None:
    (prompt,) = prompts_of((20,))
    (free,) = run(model, [make_sequence(0, prompt)], 1)
    stop_ids = frozenset({free[0], free[5]})
    (stopped,) = run(model, [make_sequence(0, prompt, stop_ids=stop_ids)], 1)
    assert stopped == free[:1]
    params = SamplingParams(temperature=0, max_tokens=64, min_tokens=10)
    (held,) = run(model, [make_sequence(0, prompt, params, stop_ids)], 1)
    assert len(held) > 10
    assert not stop_ids & set(held[:10])


def test_several_samples_share_one_prefill(model: Transformer) -> None:
    """Samples of one prompt get different noise, and each equals the same sample of a prompt prefilled by itself."""
    (prompt,) = prompts_of((70,))
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12)

    def samples() -> list[Sequence]:
        together = [make_sequence(0, prompt, params) for _ in range(4)]
        for index, sequence in enumerate(together):
            sequence.sample = index
        return together

    together = run(model, samples(), 4)
    assert len({tuple(tokens) for tokens in together}) == 4
    assert [run(model, [s], 1)[0] for s in samples()] == together
    assert run(model, samples(), 2) == together  # the second pair is prefilled on its own


def test_log_probabilities_are_of_the_raw_logits(model: Transformer) -> None:
    (prompt,) = prompts_of((9,))
    params = SamplingParams(temperature=0.5, top_k=3, seed=1, max_tokens=5, logprobs=4)
    sequence = make_sequence(0, prompt, params)
    (tokens,) = run(model, [sequence], 1)
    from llama3.forward_batch import PrefillBatch
    from llama3.kv_cache import KVCache

    whole = torch.tensor(prompt + tokens)
    cache = KVCache(model.config, 1, len(whole), torch.float32, "cpu")
    batch = PrefillBatch.build([0], [len(whole)], cache.reserve([0], [len(whole)]), "cpu")
    logprobs = model.logits(model.forward(whole, batch, cache)).log_softmax(-1)[len(prompt) - 1 :]
    for step, (token, entry) in enumerate(zip(tokens, sequence.logprobs, strict=True)):
        assert entry.logprob == pytest.approx(float(logprobs[step, token]), abs=1e-4)
        assert entry.rank == int((logprobs[step] > logprobs[step, token]).sum()) + 1 <= 3
        values, ids = logprobs[step].topk(4)
        assert list(entry.top) == ids.tolist()
        assert list(entry.top.values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_finishing_and_aborting_free_the_rows(model: Transformer) -> None:
    """What is stopped from outside leaves no trace in the sequences that take its rows over."""
    prompts = prompts_of((30, 31, 32))
    expected = run(model, [make_sequence(2, prompts[2])], 1)
    engine = Engine(model, torch.device("cpu"), torch.float32)
    engine.prepare(1, 128, 4, 2048)
    first, second, third = (make_sequence(i, p) for i, p in enumerate(prompts))
    engine.add([first, second, third])
    for _ in range(5):
        engine.step()
    engine.finish(first, "stop", "because")
    engine.finish(second, "abort")  # still waiting
    while engine.has_work:
        engine.step()
    assert (first.finish_reason, first.stop_reason, len(first.output_ids)) == ("stop", "because", 5)
    assert (second.finish_reason, second.output_ids, second.num_prefilled) == ("abort", [], 0)
    assert [third.output_ids] == expected

    engine.prepare(1, 128, 4, 2048)
    engine.add([make_sequence(0, prompts[0])])
    engine.step()
    engine.abort_all()
    assert not engine.has_work
    assert run_to_end(engine, [make_sequence(2, prompts[2], GREEDY_64)]) == expected


def run_with_made_up_tokens(
    model: Transformer, sequences: list[Sequence], num_rows: int, ends: dict[int, int]
) -> list[Launch]:
    """Launched as on a GPU; token ends[request] of each is 9, the others are 7."""
    engine = Engine(model, torch.device("cpu"), torch.float32)
    engine.prepare(num_rows, 128, 4, 2048)
    drawn = dict.fromkeys(sequences, 1)

    def draw(running: Items[Sequence], launch: Launch, options: StepOptions) -> torch.Tensor:
        tokens = torch.full((launch.num_steps, launch.num_rows), 7)
        for sequence in running:
            last = ends.get(sequence.request, -1) - drawn[sequence]
            if 0 <= last < launch.num_steps:
                tokens[last, sequence.row] = 9
            drawn[sequence] += launch.num_steps
        return tokens

    launches = launch_as_on_a_gpu(engine, draw)
    run_to_end(engine, sequences)
    return launches


@pytest.mark.parametrize("stop_ids", [frozenset(), frozenset({9})])
def test_launches_are_short_only_while_prompts_wait_for_answers_that_may_stop(
    model: Transformer, stop_ids: frozenset[int]
) -> None:
    sequences = [make_sequence(i, p, stop_ids=stop_ids) for i, p in enumerate(prompts_of((3, 1, 5, 2, 4)))]
    launches = run_with_made_up_tokens(model, sequences, num_rows=2, ends={})
    assert all(s.output_ids[1:] == [7] * 63 for s in sequences)
    while_waiting, later = (
        {launch.num_steps for launch in launches if launch.waiting == waiting} for waiting in (True, False)
    )
    at_once = STEPS_WHILE_OTHERS_WAIT if stop_ids else GRAPH_STEPS
    assert while_waiting == {at_once, 63 % at_once}
    assert max(later) == GRAPH_STEPS > STEPS_WHILE_OTHERS_WAIT


def test_places_are_kept_busy(model: Transformer) -> None:
    """Where answers end when they like, most rows of most steps draw a token that is wanted."""
    rng = random.Random(0)
    ends = {i: min(1 + int(rng.lognormvariate(3.5, 0.6)), 63) for i in range(300)}
    sequences = [make_sequence(i, [1], stop_ids=frozenset({9})) for i in ends]
    launches = run_with_made_up_tokens(model, sequences, num_rows=16, ends=ends)
    assert [len(s.output_ids) for s in sequences] == [end + 1 for end in ends.values()]
    assert sum(ends.values()) > 0.85 * sum(launch.num_steps * launch.num_rows for launch in launches)


@pytest.mark.parametrize(
    ("chunks", "min_tokens", "expected", "reason", "stop_reason"),
    [
        ([[1, 2], [3, 4, 5, 6]], 0, [1, 2, 3, 4, 5], "length", None),  # no more than max_tokens
        ([[1, 9], [3]], 0, [1, 9], "stop", 9),  # nothing after the end
        ([[1, 8, 9]], 0, [1, 8], "stop", None),  # the model's own stop token is not named
        ([[9, 1], [9, 8]], 2, [9, 1, 9], "stop", 9),  # none before min_tokens
        ([[1, 2, 3, 4, 9, 9]], 0, [1, 2, 3, 4, 9], "stop", 9),  # the last token may be the stop token
    ],
)
def test_where_an_answer_ends(
    chunks: list[list[int]], min_tokens: int, expected: list[int], reason: str, stop_reason: int | None
) -> None:
    params = SamplingParams(max_tokens=5, min_tokens=min_tokens, stop_token_ids=[9])
    sequence = make_sequence(0, [1], params, stop_ids=frozenset({8, 9}))
    assert [token for chunk in chunks for token in sequence.extend(chunk)] == expected == sequence.output_ids
    assert (sequence.finish_reason, sequence.stop_reason) == (reason, stop_reason)
