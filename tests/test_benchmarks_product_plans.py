"""The search for plans, over steps whose time is a formula, and the table that it leaves."""

import itertools
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import product_plans
from benchmarks.product_plans import change, improve, read_results, table, written
from llama3.ops import plan_table
from llama3.ops.batch_plans import Plan
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU


@given(
    form=st.sampled_from((NORM_LINEAR, LINEAR_ADD, NORM_SWIGLU)),
    num_tokens=st.sampled_from((3, 16, 20, 48, 64, 100)),
    num_rows=st.sampled_from((2048, 6144, 28672)),
    width=st.sampled_from((2048, 4096)),
    seed=st.integers(0, 1000),
)
def test_changes_are_plans_that_fill_the_gpu(form: int, num_tokens: int, num_rows: int, width: int, seed: int) -> None:
    draw, plans = random.Random(seed), product_plans.family_for(num_tokens, width)[1]
    plan = plans.choose_plan(form, num_tokens, num_rows, width, 132, True)
    for _ in range(20):
        other = change(plan, form, num_tokens, num_rows, 132, draw)
        lowest, tallest = plans.min_tile_rows(num_tokens), plans.max_tile_rows(form, num_tokens)
        assert other != plan and lowest <= other.tile_rows <= tallest and other.tile_rows % 16 == 0
        assert 66 <= -(-num_rows // other.tile_rows) * other.splits <= 396
        plan = other


def steps(limit: int):
    counted = itertools.count()
    return lambda: next(counted) < limit


def test_what_is_faster_is_kept_and_the_next_change_starts_from_there() -> None:
    """Two products whose times depend on each other; plans that cannot run are passed over."""
    draw = random.Random(3)

    def measure(plans: product_plans.Plans, repeats: int) -> float:
        few, many = plans["o"].trigger, plans["down"].trigger
        return math.inf if few == many else 100.0 + (few - 6) ** 2 + (many - few - 4) ** 2 / 2

    def propose(plans: product_plans.Plans) -> tuple[str, Plan]:
        name = draw.choice(("o", "down"))
        return name, plans[name]._replace(trigger=draw.randrange(16))

    first = {"o": Plan(1, trigger=0), "down": Plan(1, trigger=1)}
    moves = list(improve(first, propose, measure, steps(800)))
    plans = first | {move.product: move.plan for move in moves}
    assert (plans["o"].trigger, plans["down"].trigger, moves[-1].us) == (6, 10, 100.0)
    assert all(move.us < move.before_us for move in moves)
    assert [move.before_us for move in moves[1:]] == [move.us for move in moves[:-1]]


def test_what_is_only_sometimes_faster_is_not_kept() -> None:
    noise = itertools.cycle((90.0, 110.0, 100.0))
    proposals = (("o", Plan(1, trigger=n)) for n in itertools.count())
    moves = improve({"o": Plan(2)}, lambda _: next(proposals), lambda plans, repeats: next(noise), steps(50))
    assert list(moves) == []


def test_nothing_is_measured_twice() -> None:
    asked = []
    again = ("o", Plan(1, trigger=3))
    measure = lambda plans, repeats: asked.append(plans["o"].trigger) or 100.0  # noqa: E731
    assert list(improve({"o": Plan(1)}, lambda _: again, measure, steps(9))) == []
    assert asked.count(3) == 1


def test_the_table_is_what_the_results_say() -> None:
    results = read_results()
    assert written(table(results)) == plan_table.TABLE.read_text()
    cases = {(result["shape"], result["tokens"]) for result in results.values()}
    assert len(plan_table.plans()) == len(json.loads(plan_table.TABLE.read_text())) == 4 * len(cases)


def test_what_was_found_on_another_gpu_is_not_in_the_table() -> None:
    result = read_results()["1b-16"]
    assert len(table({"a": result, "b": result | {"device": "NVIDIA H100", "shape": "8b"}})) == 4


@pytest.mark.parametrize("name", sorted(read_results()))
def test_plans_in_the_table_were_faster_than_those_before(name: str) -> None:
    rows = read_results()[name]["rows"]
    assert rows and all(row["us"] < row["before_us"] for row in rows)
