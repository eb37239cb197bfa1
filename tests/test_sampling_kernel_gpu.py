"""The sampling kernels against llama3.sampling, an fp64 oracle, and exact distributions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from llama3.decode_state import IDLE, DecodeState
from llama3.ops.sampling import RULES, sample, sample_and_place
from llama3.sampling import FLOAT_FIELDS, SamplingTensors, gumbel_noise, sample_tokens

pytestmark = pytest.mark.gpu
V = 128256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Relative error of a sum of probabilities, in the kernel (integers of 2^-31 of the greatest) and in fp32.
MASS_ERROR = 1e-5
NO_LIMIT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def rules(*rows: dict, seed: int = 7, **flags: bool) -> SamplingTensors:
    """A row for each dict; the key's request is the row's number."""
    filled = [NO_LIMIT | {"seed": seed, "request": i, "sample": 0} | row for i, row in enumerate(rows)]
    arrays = {
        name: torch.tensor(
            [row[name] for row in filled],
            dtype=torch.float32 if name in FLOAT_FIELDS else torch.int64,
            device="cuda",
        )
        for name in RULES
    }
    return SamplingTensors(**arrays, **flags)


def mixed_rules(count: int, vocab_size: int, seed: int) -> SamplingTensors:
    """Every combination of filters, in some order, with mild and extreme values."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        row = {"temperature": float(rng.choice([0.01, 0.3, 0.6, 0.6, 1.0, 1.0, 1.7, 20.0]))}
        if i % 16 == 15:
            row["temperature"] = 0.0
        if i % 2:
            row["top_p"] = float(rng.choice([1e-6, 0.1, 0.5, 0.9, 0.9, 0.95, 0.999, 0.9999999]))
        if i % 4 >= 2:
            row["top_k"] = int(rng.choice([1, 2, 20, 50, 1000, vocab_size - 1, vocab_size, vocab_size + 9]))
        if i % 8 >= 4:
            row["min_p"] = float(rng.choice([1e-4, 0.05, 0.3, 1.0]))
        row |= {"seed": int(rng.integers(0, 2**63)), "request": int(rng.integers(0, 2**32)), "sample": i % 3}
        rows.append(row)
    return rules(*rows)


def peaked(batch: int, vocab_size: int) -> torch.Tensor:
    """Like a language model's: a bulk around 0 and a few hundred tokens in a tail that reaches about 20."""
    bulk = torch.randn(batch, vocab_size, device="cuda") * 2
    tail = torch.rand(batch, vocab_size, device="cuda") ** 400 * 20
    return bulk + tail


KINDS = {
    "normal": lambda b, v: torch.randn(b, v, device="cuda"),
    "wide": lambda b, v: torch.randn(b, v, device="cuda") * 12,
    "peaked": peaked,
    "equal": lambda b, v: torch.full((b, v), 3.25, device="cuda"),
    "two values": lambda b, v: torch.randint(0, 2, (b, v), device="cuda").float() * 4,
    "integers": lambda b, v: (torch.randn(b, v, device="cuda") * 3).round(),
    "one peak": lambda b, v: torch.randn(b, v, device="cuda").scatter_(
        1, torch.randint(0, v, (b, 1), device="cuda"), 40.0
    ),
    "ties at the top": lambda b, v: torch.randn(b, v, device="cuda").clamp_(max=1.5),
    "masked": lambda b, v: torch.randn(b, v, device="cuda").where(
        torch.rand(b, v, device="cuda") < 0.001, torch.tensor(-torch.inf, device="cuda")
    ),
    "negative": lambda b, v: torch.rand(b, v, device="cuda") * 30 - 80,
    "around zero": lambda b, v: torch.randn(b, v, device="cuda") * 1e-3,
    "tiny": lambda b, v: torch.randn(b, v, device="cuda") * 1e-6,
    "huge": lambda b, v: torch.randn(b, v, device="cuda") * 1e4,
    "zeros of both signs": lambda b, v: torch.zeros(b, v, device="cuda").copysign_(torch.randn(b, v, device="cuda")),
}


def check_against_fp64(
    logits: torch.Tensor, params: SamplingTensors, positions: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Each token may be drawn, and no token that surely may be drawn has a greater perturbed score."""
    greedy = params.temperature == 0
    scores = logits.float() / torch.where(greedy, 1.0, params.temperature)[:, None]
    wide = scores.double()
    relative = (wide - wide.amax(-1, keepdim=True)).exp()
    ordered, order = wide.sort(-1, descending=True)
    vocab_size = scores.shape[1]
    limit = torch.where(params.top_k > 0, params.top_k, vocab_size).clamp(max=vocab_size)[:, None]
    mass = relative.gather(1, order)
    mass = torch.where(torch.arange(vocab_size, device="cuda") < limit, mass, 0)
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass.cumsum(-1)], -1) / mass.sum(-1, keepdim=True)
    num_greater = torch.searchsorted(-ordered, -wide.contiguous(), side="left")
    mass_greater = before.gather(1, num_greater)
    top_p = torch.where(params.top_p < 1, params.top_p.double(), torch.inf)[:, None]
    min_p = params.min_p.double()[:, None]

    def kept(slack: float) -> torch.Tensor:
        allowed = (mass_greater < top_p + slack) & (relative >= min_p * (1 - slack)) | (num_greater == 0)
        return allowed & (num_greater < limit)

    surely, perhaps = kept(-MASS_ERROR), kept(MASS_ERROR)
    perturbed = (scores + torch.where(greedy[:, None], 0.0, gumbel_noise(params, positions, vocab_size))).double()
    drawn = perturbed.gather(1, tokens[:, None])
    best = torch.where(surely, perturbed, -torch.inf).amax(-1, keepdim=True)
    assert perhaps.gather(1, tokens[:, None]).logical_or(greedy[:, None]).all(), "a token that is filtered out"
    rounding = 1e-6 * (1 + scores.gather(1, tokens[:, None]).abs())
    assert (drawn >= best - rounding).all(), "not the winner"


def check(logits: torch.Tensor, params: SamplingTensors, positions: torch.Tensor, most_differing: int = 0) -> None:
    tokens = sample(logits, params, positions)
    expected = sample_tokens(logits, params, positions)
    assert tokens.min() >= 0 and tokens.max() < logits.shape[1]
    check_against_fp64(logits, params, positions, tokens)
    assert (tokens != expected).sum() <= most_differing


def random_positions(batch: int) -> torch.Tensor:
    return torch.randint(0, 131072, (batch,), dtype=torch.int32, device="cuda")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_draws_what_the_reference_draws(kind: str, dtype: torch.dtype) -> None:
    batch = 64
    logits = KINDS[kind](batch, V).to(dtype)
    # One row in a batch may lie within rounding of another result; check_against_fp64 shows that no more is wrong.
    check(logits, mixed_rules(batch, V, seed=1), random_positions(batch), most_differing=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 8, 100, 512, 2048, 8193, 32003, 49152])
def test_other_vocabularies(vocab_size: int, dtype: torch.dtype) -> None:
    for seed, kind in enumerate(("normal", "peaked", "integers")):
        logits = KINDS[kind](128, vocab_size).to(dtype)
        check(logits, mixed_rules(128, vocab_size, seed), random_positions(128), most_differing=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "padding"), [(0, 8), (8, 64), (1, 1), (3, 0)])
def test_strided_rows_and_what_lies_around_them(first: int, padding: int, dtype: torch.dtype) -> None:
    """Columns outside of the view are NaN and +inf: reading one would win."""
    batch, vocab_size = 32, 20000
    memory = torch.full((batch, first + vocab_size + padding), torch.nan, device="cuda", dtype=dtype)
    memory[:, ::2] = torch.inf
    logits = memory[:, first : first + vocab_size]
    logits.copy_(peaked(batch, vocab_size))
    check(logits, mixed_rules(batch, vocab_size, seed=5), random_positions(batch), most_differing=1)


def test_greedy_and_unfiltered_flags_choose_kernels_that_agree() -> None:
    logits, positions = peaked(40, V).bfloat16(), random_positions(40)
    greedy = rules(*[{"temperature": 0.0}] * 40)
    expected = logits.float().argmax(-1)
    for flags in ({"all_greedy": True}, {"any_filter": False}, {"any_filter": True}):
        assert torch.equal(sample(logits, replace(greedy, **flags), positions), expected)
    warm = rules(*[{"temperature": 0.8}] * 20, *[{"temperature": 0.0}] * 20)
    expected = sample_tokens(logits, replace(warm, any_filter=False), positions)
    for any_filter in (False, True):
        assert torch.equal(sample(logits, replace(warm, any_filter=any_filter), positions), expected)


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.full((4, V), -1.0, device="cuda", dtype=torch.bfloat16)
    logits[0, [77, 100000, 128255]] = 5.0
    logits[1, :] = 0.0
    logits[2, 3], logits[2, 1000] = -0.0, 0.0
    tokens = sample(logits, rules(*[{"temperature": 0.0}] * 4, all_greedy=True), random_positions(4))
    assert tokens.tolist() == [77, 0, 3, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("all_greedy", [True, False])
def test_rows_that_are_not_finite(dtype: torch.dtype, all_greedy: bool) -> None:
    """NaN, then +inf, then token 0: never an id that does not exist, and the neighbours do not notice."""
    inf, nan = torch.inf, torch.nan
    filters = [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {}, {"top_k": 3, "top_p": 0.5, "min_p": 0.2}]
    for rule in filters:
        logits = torch.randn(8, V, device="cuda").to(dtype)
        expected = sample(logits, rules(*[rule] * 8), positions := random_positions(8))
        logits[1] = -inf
        logits[2] = nan
        logits[3, [500, 90000]], logits[3, 7] = nan, inf
        logits[4, [300, 127999]] = inf
        logits[5, 5000] = -nan
        logits[6], logits[6, 128001] = -inf, -3.0
        params = rules(*[rule | ({"temperature": 0.0} if all_greedy else {})] * 8, all_greedy=all_greedy)
        tokens = sample(logits, params, positions)
        assert tokens[1:7].tolist() == [0, 0, 500, 300, 5000, 128001]
        if not all_greedy:
            assert torch.equal(tokens[[0, 7]], expected[[0, 7]])


def test_edges_of_the_rules() -> None:
    """top_k 1, a tiny top_p and min_p 1 all leave the likeliest, with its ties."""
    logits = torch.randn(3, V, device="cuda")
    logits[:, [10, 60000]] = 9.0
    for rule in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        seen = set()
        for request in range(40):
            params = rules(*[rule | {"request": request * 3 + i} for i in range(3)])
            seen |= set(sample(logits, params, random_positions(3)).tolist())
        assert seen == {10, 60000}


@pytest.mark.parametrize("kind", ["peaked", "normal", "equal"])
def test_a_draw_depends_on_its_key_alone(kind: str) -> None:
    """Not on the batch, the row's place in it, its neighbours, or the number of blocks that share the row."""
    count = 48
    logits, positions, params = KINDS[kind](count, V).bfloat16(), random_positions(count), mixed_rules(count, V, 3)
    expected = sample(logits, params, positions)
    for blocks in (1, 2, 4, 8, 16):
        assert torch.equal(sample(logits, params, positions, blocks_per_row=blocks), expected)
    order = torch.randperm(count, device="cuda")
    assert torch.equal(sample(logits[order], params.rows(order), positions[order]), expected[order])
    for row in range(0, count, 5):
        one = slice(row, row + 1)
        assert torch.equal(sample(logits[one], params.rows(one), positions[one]), expected[one])


def test_repeats_are_equal() -> None:
    logits, positions, params = torch.randn(64, V, device="cuda"), random_positions(64), mixed_rules(64, V, 4)
    expected = sample(logits, params, positions)
    for _ in range(30):
        assert torch.equal(sample(logits, params, positions), expected)


CHI_SQUARE_RULES = {
    "temperature": {"temperature": 0.6},
    "top-p": {"temperature": 0.6, "top_p": 0.9},
    "top-k": {"temperature": 1.0, "top_k": 40},
    "min-p": {"temperature": 1.0, "min_p": 0.02},
    "all": {"temperature": 0.8, "top_k": 60, "top_p": 0.95, "min_p": 0.01},
}


@pytest.mark.parametrize("vocab_size", [512, V])
@pytest.mark.parametrize("rule", CHI_SQUARE_RULES.values(), ids=CHI_SQUARE_RULES.keys())
def test_chi_square_against_the_exact_distribution(rule: dict, vocab_size: int) -> None:
    """One row drawn at 40000 positions; expected counts from an fp64 sort."""
    draws = 40000
    logits = (torch.randn(1, vocab_size, device="cuda") * 2 if vocab_size < V else peaked(1, vocab_size)).bfloat16()
    one = rules(rule)
    params = replace(one, **{name: getattr(one, name).expand(draws).contiguous() for name in RULES})
    tokens = sample(logits.expand(draws, -1), params, torch.arange(draws, dtype=torch.int32, device="cuda"))

    scores = logits[0].double() / rule["temperature"]
    ordered = scores.sort(descending=True).values
    keep = torch.arange(vocab_size, device="cuda") < rule.get("top_k", vocab_size)
    mass = torch.where(keep, ordered, -torch.inf).softmax(0)
    keep &= mass.cumsum(0) - mass < rule.get("top_p", 2.0)
    keep &= mass >= rule.get("min_p", 0.0) * mass[0]
    expected = torch.where(scores >= ordered[keep].min(), scores, -torch.inf).softmax(0).cpu().numpy()
    observed = np.bincount(tokens.cpu().numpy(), minlength=vocab_size)
    assert observed[expected == 0].sum() == 0
    frequent = expected * draws >= 5
    counts = np.append(observed[frequent], observed[~frequent].sum())
    means = np.append(expected[frequent], expected[~frequent].sum()) * draws
    assert stats.chisquare(counts[means > 0], means[means > 0]).pvalue > 1e-3


def test_graph_replays_see_new_logits_positions_and_rules() -> None:
    batch = 16
    logits, positions, params = peaked(batch, V).bfloat16(), random_positions(batch), mixed_rules(batch, V, 6)
    out = sample(logits, params, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copied = logits.clone()
        sample(copied, params, positions, out)
        again = sample(copied, params, positions)
    for round_number in range(4):
        logits.copy_(torch.randn(batch, V, device="cuda") * 3)
        positions.add_(1)
        params.temperature.fill_(0.5 + 0.2 * round_number)
        out.fill_(-5)
        graph.replay()
        expected = sample(logits, params, positions)
        assert torch.equal(out, expected) and torch.equal(again, expected)


def decode_state(batch: int, params: SamplingTensors, stop_ids: torch.Tensor, positions: torch.Tensor) -> DecodeState:
    state = DecodeState(batch + 3, stop_ids.shape[1], torch.device("cuda"))
    state.sampling = params
    state.stop_ids[:batch] = stop_ids
    state.positions[:batch] = positions
    state.last_positions[:batch] = 1000
    state.first_stop_positions[:batch] = 0
    return state


@pytest.mark.parametrize("blocks_per_row", [1, 4, 16])
@pytest.mark.parametrize("forbid", [False, True])
def test_sample_and_place_is_a_draw_and_a_place(forbid: bool, blocks_per_row: int) -> None:
    batch, num_steps = 24, 12
    params = rules(*[{"temperature": 0.9, "top_p": 0.9, "request": i} for i in range(batch)])
    stop_ids = torch.randint(0, 40, (batch, 5), device="cuda")
    stop_ids[:, 3:] = -1
    positions = torch.randint(20, 30, (batch,), dtype=torch.int32, device="cuda")
    positions[::7] = IDLE
    states = [decode_state(batch, params, stop_ids, positions) for _ in range(2)]
    for state in states:
        state.last_positions[:batch] = torch.arange(batch, dtype=torch.int32, device="cuda") + 22
        state.first_stop_positions[:batch] = positions + 4
    rows = slice(0, batch)
    ended = 0
    for _ in range(num_steps):
        logits = torch.randn(batch, V, device="cuda")
        logits[:, :40] += 9
        ours, theirs = logits.bfloat16(), logits.bfloat16()
        fused, plain = states
        was_idle = plain.positions[rows] < 0
        at = plain.positions[rows] + 1
        if forbid:
            plain.forbid_early_stops(theirs, rows, at)
        tokens = sample_and_place(ours, params, fused, forbid_early_stops=forbid, blocks_per_row=blocks_per_row)
        expected = sample(theirs, params, at)
        plain.place(rows, expected, torch.where(was_idle, IDLE, at))
        assert torch.equal(tokens, torch.where(was_idle, 0, expected))
        assert torch.equal(fused.positions, plain.positions)
        assert torch.equal(fused.token_ids[rows][~was_idle], plain.token_ids[rows][~was_idle])
        assert torch.equal(ours[~was_idle], theirs[~was_idle])
        early = (at < plain.first_stop_positions[rows]) & ~was_idle
        if forbid and early.any():
            assert not (tokens[:, None] == stop_ids)[early].any()
        ended += int(((plain.positions[rows] < 0) & ~was_idle).sum())
    assert ended > 5  # the stops were reached
    assert (states[0].token_ids[batch:] == 0).all() and (states[0].positions[batch:] == IDLE).all()
