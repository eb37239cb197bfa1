"""The products for few tokens against the reference ops in fp64, within the numerics contract of the design."""

import pytest

from llama3.ops import skinny_linear
from llama3.ops.skinny_plans import Plan, min_tile_rows
from tests.one_kernel_helpers import (
    SHAPES,
    UNEVEN,
    check_all,
    check_chain_in_a_graph,
    check_head,
    check_many_repeats,
    check_residual_as_result,
    check_zero_rows,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper", "poisoned_allocations")]
COUNTS = (1, 2, 7, 8, 9, 16, 17, 31, 32)
PLANS = (Plan(16, 1), Plan(32, 2), Plan(48, 3), Plan(64, 1), Plan(80, 4), Plan(112, 2), Plan(128, 8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_chosen_plans(num_tokens: int, shape: tuple[int, int]) -> None:
    check_all(skinny_linear, num_tokens, *shape, {})


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_every_plan(num_tokens: int, plan: Plan) -> None:
    if plan.tile_rows < min_tile_rows(num_tokens):
        pytest.skip("not for so many tokens")
    check_all(skinny_linear, num_tokens, *UNEVEN, {"plan": plan})


@pytest.mark.parametrize("trigger", (0, 20))
@pytest.mark.parametrize("ahead", (0, 1, 3, 16))
@pytest.mark.parametrize("plan", (Plan(64, 1, 60 << 10), Plan(64, 4, 200 << 10), Plan(128, 1)), ids=str)
def test_every_part_of_the_ring_asked_for_early(plan: Plan, ahead: int, trigger: int) -> None:
    check_all(skinny_linear, 13, *UNEVEN, {"plan": plan._replace(ahead=ahead, trigger=trigger)})


@pytest.mark.parametrize("ahead", (2, 16))
def test_several_tiles_a_block(ahead: int) -> None:
    check_all(skinny_linear, 13, 32 * 300, 704, {"plan": Plan(32, 1, ahead=ahead)})


@pytest.mark.parametrize("num_tokens", (1, 16, 32))
def test_head_over_a_large_vocabulary(num_tokens: int) -> None:
    check_head(skinny_linear, num_tokens)


@pytest.mark.parametrize("num_tokens", (5, 16, 30))
def test_the_residual_may_be_the_result(num_tokens: int) -> None:
    check_residual_as_result(skinny_linear, num_tokens)


def test_zero_rows_are_not_divided_by() -> None:
    check_zero_rows(skinny_linear)


@pytest.mark.parametrize("num_tokens", (3, 16, 32))
def test_a_chain_in_a_graph_gives_the_same_bits(num_tokens: int) -> None:
    """Every kernel starts before its predecessor has ended, and must not read what that still writes."""
    check_chain_in_a_graph(skinny_linear, num_tokens)


@pytest.mark.parametrize("shape", ((2048, 8192), (3072, 2048)), ids=str)
@pytest.mark.parametrize("num_tokens", (8, 16, 32))
def test_many_repeats(num_tokens: int, shape: tuple[int, int]) -> None:
    check_many_repeats(skinny_linear, num_tokens, *shape)
