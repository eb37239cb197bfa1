"""The products for a decode step against the reference ops in fp64, within the numerics contract of the design."""

import pytest
import torch

from llama3.ops import batch_linear, linear
from llama3.ops.batch_plans import HEAD, Plan
from llama3.ops.reference import ReferenceOps
from tests.numerics import assert_within_contract
from tests.one_kernel_helpers import (
    EPS,
    SHAPES,
    UNEVEN,
    check_all,
    check_chain_in_a_graph,
    check_contract,
    check_head,
    check_many_repeats,
    check_residual_as_result,
    check_squares,
    check_swiglu,
    check_zero_rows,
    norm_linear,
    norm_swiglu,
    normal,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper", "poisoned_allocations")]
COUNTS = (1, 8, 15, 16, 17, 31, 32, 33, 48, 50, 64, 65, 96, 97, 127, 128)
PLANS = tuple(Plan(splits) for splits in (1, 2, 3, 4, 5, 7, 8))
ALONE = 200 << 10  # one block a multiprocessor


def check_norm_behind(num_tokens: int, num_rows: int, size: int, plan: Plan | None) -> None:
    """The sums of squares for the norm that follows, and what products make of them."""
    x, weight, residual = (
        normal(num_tokens, size),
        normal(num_rows, size, scale=size**-0.5),
        normal(num_tokens, num_rows),
    )
    wide = normal(1040, num_rows, scale=num_rows**-0.5)
    torch.cuda.synchronize()
    result, squares = batch_linear.linear_add_squares(x, weight, residual, plan)
    assert torch.equal(result, batch_linear.linear_add(x, weight, residual, plan))
    check_squares(result, squares)
    if num_rows % 64:
        return  # as the inner dimension of the next product
    for run, reference in ((batch_linear.norm_linear, norm_linear), (batch_linear.norm_swiglu, norm_swiglu)):
        normed = run(result, wide, EPS, squares)
        assert_within_contract(normed, reference(result.double(), wide.double(), EPS), reference(result, wide, EPS))
        assert torch.equal(normed, run(result, wide, EPS, squares))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_chosen_plans(num_tokens: int, shape: tuple[int, int]) -> None:
    check_all(batch_linear, num_tokens, *shape, {})


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_every_plan(num_tokens: int, plan: Plan) -> None:
    if num_tokens > 64 and plan.splits == 7:
        pytest.skip("their sums need more room than a block has")
    check_all(batch_linear, num_tokens, *UNEVEN, {"plan": plan})


@pytest.mark.parametrize("splits", (1, 2, 4, 7))
@pytest.mark.parametrize("tile_rows", (32, 48, 64, 80, 144, 208, 240, 256))
@pytest.mark.parametrize("num_tokens", (16, 20, 64))
def test_every_height_of_a_tile(num_tokens: int, tile_rows: int, splits: int) -> None:
    if tile_rows < 64 and num_tokens != 64:
        pytest.skip("tiles of fewer rows than an instruction's, where weights are its rows")
    check = check_all if tile_rows <= 128 else check_swiglu  # only its tiles may be taller
    check(batch_linear, num_tokens, *UNEVEN, {"plan": Plan(splits, ALONE, 0, tile_rows)})


@pytest.mark.parametrize("ahead", (0, 1, 3, 14))
@pytest.mark.parametrize("plan", (Plan(2, ALONE, 0, 64), Plan(1, ALONE, 0, 128)), ids=str)
def test_every_part_of_the_ring_asked_for_early(plan: Plan, ahead: int) -> None:
    check_all(batch_linear, 40, *UNEVEN, {"plan": plan._replace(ahead=ahead)})


@pytest.mark.parametrize("x_stages", (2, 3, 5))
@pytest.mark.parametrize("plan", (Plan(1, ALONE, 4, 128, 2), Plan(2, ALONE, 0, 64), Plan(4, 106 << 10)), ids=str)
@pytest.mark.parametrize("num_tokens", (9, 20, 64, 100))
def test_fewer_stages_of_x_than_of_weight(num_tokens: int, plan: Plan, x_stages: int) -> None:
    """A ring of its own, whose stages come round sooner; of some blocks all steps have a stage at once."""
    for shape in (UNEVEN, (256, 448), (256, 8192)):
        check_all(batch_linear, num_tokens, *shape, {"plan": plan._replace(x_stages=x_stages)})


@pytest.mark.parametrize("plan", (None, *PLANS[:4], Plan(8), Plan(2, ALONE, 0, 64), Plan(1, ALONE, 0, 80)), ids=str)
@pytest.mark.parametrize("num_tokens", (1, 16, 17, 33, 48, 64, 90, 128))
def test_squares_for_the_norm_that_follows(num_tokens: int, plan: Plan | None) -> None:
    for num_rows, size in ((2048, 2112), (1040, 704), (4096, 1024)):
        check_norm_behind(num_tokens, num_rows, size, plan)


@pytest.mark.parametrize("tile_rows", (80, 112))
@pytest.mark.parametrize("splits", (1, 2, 4, 7))
@pytest.mark.parametrize("num_tokens", (16, 17, 64))
def test_squares_of_tiles_of_other_heights(num_tokens: int, splits: int, tile_rows: int) -> None:
    check_norm_behind(num_tokens, 2048, 2112, Plan(splits, ALONE, 0, tile_rows))


@pytest.mark.parametrize("num_tokens", (1, 16, 64, 128))
def test_head_over_a_large_vocabulary(num_tokens: int) -> None:
    check_head(batch_linear, num_tokens)


@pytest.mark.parametrize("num_rows", (16, 48, 4096, 33808, 128256))
@pytest.mark.parametrize("num_tokens", (1, 16, 33, 64, 65, 128))
def test_many_tiles_a_block(num_tokens: int, num_rows: int) -> None:
    """Fewer boxes than blocks, one each, tiles that are not full, and a box that is not."""
    for size, how in (
        (2112, {}),
        (192, {"plan": HEAD._replace(tile_rows=256 if num_tokens <= 64 else 128, x_stages=9)}),
    ):
        x, weight = normal(num_tokens, size), normal(num_rows, size, scale=size**-0.5)
        check_contract(batch_linear.linear, torch.nn.functional.linear, how, x, weight)


def test_head_of_the_model_beside_the_library() -> None:
    x, norm, weight = normal(64, 2048), normal(2048), normal(128256, 2048, scale=2048**-0.5)
    torch.cuda.synchronize()
    result = linear.norm_linear(x, norm, weight, EPS)
    wide = ReferenceOps().norm_linear(x.double(), norm.double(), weight.double(), EPS)
    assert_within_contract(result, wide, ReferenceOps().norm_linear(x, norm, weight, EPS))


@pytest.mark.parametrize("num_tokens", (5, 16, 60, 128))
def test_the_residual_may_be_the_result(num_tokens: int) -> None:
    check_residual_as_result(batch_linear, num_tokens)


def test_zero_rows_are_not_divided_by() -> None:
    check_zero_rows(batch_linear)


@pytest.mark.parametrize("num_tokens", (3, 16, 40, 64, 90, 128))
def test_a_chain_in_a_graph_gives_the_same_bits(num_tokens: int) -> None:
    """Every kernel starts before its predecessor has ended, and must not read what that still writes."""
    check_chain_in_a_graph(batch_linear, num_tokens)


@pytest.mark.parametrize("num_tokens", (24, 64, 128))
def test_many_repeats_of_the_head(num_tokens: int) -> None:
    x, weight = normal(num_tokens, 512), normal(40000, 512, scale=512**-0.5)
    torch.cuda.synchronize()
    expected = batch_linear.linear(x, weight)
    assert all(torch.equal(batch_linear.linear(x, weight), expected) for _ in range(500))


@pytest.mark.parametrize("shape", ((2048, 8192), (3072, 2048)), ids=str)
@pytest.mark.parametrize("num_tokens", (24, 64, 128))
def test_many_repeats(num_tokens: int, shape: tuple[int, int]) -> None:
    check_many_repeats(batch_linear, num_tokens, *shape)
