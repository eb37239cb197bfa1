"""Sampling against exact distributions, transformers' filters, and an independent Philox."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama3.errors import RequestError
from llama3.sampling import SamplingTensors, filter_scores, gumbel_noise, philox, sample_tokens
from llama3.sampling_params import SamplingParams

RULES = {
    "temperature": {"temperature": 0.7},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "all": {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}


def rows_of(
    count: int, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        min_p=torch.full((count,), min_p),
        seed=torch.zeros(count, dtype=torch.int64),
        request=torch.zeros(count, dtype=torch.int64),
        sample=torch.zeros(count, dtype=torch.int64),
    )


def exact_distribution(logits: torch.Tensor, rule: dict) -> torch.Tensor:
    """By transformers' own warpers, in fp64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(rule["temperature"])])
    if "top_k" in rule:
        warpers.append(TopKLogitsWarper(rule["top_k"]))
    if "top_p" in rule:
        warpers.append(TopPLogitsWarper(rule["top_p"]))
    if "min_p" in rule:
        warpers.append(MinPLogitsWarper(rule["min_p"]))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits.double()[None]).softmax(-1)[0]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_chi_square_against_the_exact_distribution(rule: dict) -> None:
    """One row at many positions: 40000 draws, each keyed by its position alone."""
    logits = torch.randn(64, generator=torch.Generator().manual_seed(5)) * 2
    draws = 40000
    params = rows_of(draws, **rule)
    tokens = sample_tokens(logits.expand(draws, -1), params, torch.arange(draws))
    expected = exact_distribution(logits, rule).numpy()
    observed = np.bincount(tokens.numpy(), minlength=64)
    assert observed[expected == 0].sum() == 0
    frequent = expected * draws >= 5
    rare = (expected > 0) & ~frequent
    bins = [*zip(observed[frequent], expected[frequent] * draws, strict=True)]
    if rare.any():
        bins.append((observed[rare].sum(), expected[rare].sum() * draws))
    counts, means = np.array(bins).T
    assert stats.chisquare(counts, means * counts.sum() / means.sum()).pvalue > 1e-3


@settings(max_examples=200, deadline=None)
@example(seed=0, temperature=0.0625, top_k=3, top_p=1.0, min_p=0.0)
@example(seed=0, temperature=0.125, top_k=3, top_p=1 - 2**-24, min_p=0.0)
@given(
    seed=st.integers(0, 10**6),
    # What a row holds is fp32: a top_p of 1 - 1e-16 is a 1 to it, and would be another rule to transformers in fp64.
    temperature=st.floats(3 / 64, 3, width=32),
    top_k=st.integers(1, 50),
    top_p=st.floats(2**-7, 1, width=32),
    min_p=st.floats(0, 1, width=32),
)
def test_the_tokens_kept_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)).double() * 3
    rule = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = exact_distribution(logits, rule) > 0
    scores = (logits / temperature)[None]
    kept = filter_scores(scores, rows_of(1, **rule)).isfinite()[0]
    if not torch.equal(kept, expected):  # only where rounding decides whether the mass just reaches top_p
        different = kept != expected
        probabilities = exact_distribution(logits, {"temperature": temperature, "top_k": top_k})
        ordered = probabilities.sort(descending=True).values.cumsum(0)
        assert different.sum() == 1
        assert (ordered - top_p).abs().min() < 1e-6 or (probabilities / probabilities.max() - min_p).abs().min() < 1e-6


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert sample_tokens(logits, rows_of(2, temperature=0), torch.zeros(2)).tolist() == [1, 0]


def test_a_top_p_that_fp32_rounds_to_zero_keeps_the_likeliest() -> None:
    scores = torch.tensor([[0.0, 1.0, 9.0, 2.0]])
    kept = filter_scores(scores, rows_of(1, temperature=1, top_p=1e-60)).isfinite()
    assert kept.tolist() == [[False, False, True, False]]


def test_ties_with_the_last_token_kept_stay() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert filter_scores(scores, rows_of(1, temperature=1, top_k=2)).isfinite().tolist() == [[True, True, True, False]]


def test_a_row_draws_the_same_in_any_batch_and_order() -> None:
    logits = torch.randn(6, 200)
    params = rows_of(6, temperature=0.8, top_p=0.9)
    params = SamplingTensors(**{**vars(params), "seed": torch.arange(6) * 2**33, "request": torch.arange(6)})
    positions = torch.tensor([4, 4, 9, 100000, 0, 7])
    together = sample_tokens(logits, params, positions)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(sample_tokens(logits[order], params.rows(order), positions[order]), together[order])
    for row in range(6):
        one = slice(row, row + 1)
        assert sample_tokens(logits[one], params.rows(one), positions[one]) == together[one]


def test_seed_request_sample_and_position_each_change_the_noise() -> None:
    base = {"seed": 1, "request": 2, "sample": 3, "position": 4}
    rows = [base] + [base | {key: value + 1} for key, value in base.items()] + [base | {"seed": 1 + 2**32}]
    columns = {key: torch.tensor([row[key] for row in rows]) for key in base}
    params = SamplingTensors(
        **{**vars(rows_of(len(rows), temperature=1.0)), **{k: columns[k] for k in ("seed", "request", "sample")}}
    )
    noise = gumbel_noise(params, columns["position"], 64)
    assert len({tuple(row) for row in noise.tolist()}) == len(rows)


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(rows_of(8, temperature=1.0), torch.arange(8), 50000).flatten().numpy()
    assert np.isfinite(noise).all()
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3


def test_philox_equals_the_published_vectors() -> None:
    """Known answers of Philox4x32-10 from the generator's authors (Random123, kat_vectors)."""
    ones = 0xFFFFFFFF
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    for counter, key, expected in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (*pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        words = philox([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
        assert [int(word) for word in words] == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, r"top_p is 0; it must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -2}, "top_k is -2; it must be an integer >= 1, or 0 or -1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"min_p": 2}, r"min_p is 2; it must be in \[0, 1\]"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be an integer >= 1, or None"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens is 20; it must be between 0 and max_tokens"),
        ({"stop": ""}, "stop is ''; it must be a non-empty string"),
        ({"stop": [1]}, r"stop is \[1\]"),
        ({"stop": 1}, "stop is 1; it must be a non-empty string or a list of them"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids is"),
        ({"seed": -1}, "seed is -1"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"n": 0}, "n is 0; it must be an integer >= 1"),
    ],
)
def test_bad_parameters_are_named(values: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize(("stop", "strings"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b"))])
def test_one_stop_many_or_none(stop: str | list[str] | None, strings: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


@pytest.mark.parametrize(("ids", "kept"), [(None, ()), (5, (5,)), ({5}, (5,)), ([5, 6], (5, 6))])
def test_one_stop_id_many_or_none(ids: Any, kept: tuple[int, ...]) -> None:
    assert SamplingParams(stop_token_ids=ids).stop_token_ids == kept
