"""The products for few tokens against the reference ops in fp64, within the numerics contract of the design."""

import pytest

from llama3.ops import skinny_linear
from llama3.ops.skinny_linear import Tiling
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
TILINGS = (Tiling(16, 1), Tiling(32, 2), Tiling(48, 3), Tiling(64, 1), Tiling(80, 4), Tiling(112, 2), Tiling(128, 8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_chosen_tilings(num_tokens: int, shape: tuple[int, int]) -> None:
    check_all(skinny_linear, num_tokens, *shape, {})


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_every_tiling(num_tokens: int, tiling: Tiling) -> None:
    if tiling.tile_rows < skinny_linear.min_tile_rows(num_tokens):
        pytest.skip("not for so many tokens")
    check_all(skinny_linear, num_tokens, *UNEVEN, {"tiling": tiling})


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
