"""The products for few tokens against the reference ops in fp64, within the numerics contract of the design."""

from collections.abc import Callable

import pytest
import torch

from llama3.ops import skinny_linear
from llama3.ops.reference import ReferenceOps
from llama3.ops.skinny_linear import Tiling
from tests.numerics import assert_within_contract

pytestmark = pytest.mark.gpu
EPS = 1e-5
COUNTS = (1, 2, 7, 8, 9, 16, 17, 31, 32)
# Rows and size: 1B's, 3B's and 8B's products, and sizes that divide by little.
SHAPES = ((3072, 2048), (2048, 8192), (5120, 3072), (4096, 14336), (48, 64), (1040, 704), (2064, 320))
TILINGS = (Tiling(16, 1), Tiling(32, 2), Tiling(48, 3), Tiling(64, 1), Tiling(80, 4), Tiling(112, 2), Tiling(128, 8))


@pytest.fixture(autouse=True, scope="module")
def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fresh memory is NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(torch.bfloat16)


def check_contract(
    kernel: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    tiling: Tiling | None,
    *inputs: torch.Tensor | float,
) -> None:
    torch.cuda.synchronize()  # weights must not have been written by the kernel just before
    result = kernel(*inputs, tiling=tiling)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]
    assert_within_contract(result, reference(*wide), reference(*inputs))
    assert torch.equal(result, kernel(*inputs, tiling=tiling))


def check_all(num_tokens: int, num_rows: int, size: int, tiling: Tiling | None) -> None:
    reference = ReferenceOps()
    x, norm, weight = normal(num_tokens, size, scale=3), normal(size), normal(num_rows, size, scale=size**-0.5)
    check_contract(skinny_linear.norm_linear, reference.norm_linear, tiling, x, norm, weight, EPS)
    check_contract(skinny_linear.norm_swiglu, reference.norm_swiglu, tiling, x, norm, weight, EPS)
    residual = normal(num_tokens, num_rows)
    check_contract(skinny_linear.linear_add, reference.linear_add, tiling, x, weight, residual)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_chosen_tilings(num_tokens: int, shape: tuple[int, int]) -> None:
    check_all(num_tokens, *shape, None)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_every_tiling(num_tokens: int, tiling: Tiling) -> None:
    if tiling.tile_rows < skinny_linear.min_tile_rows(num_tokens):
        pytest.skip("not for so many tokens")
    check_all(num_tokens, 1040, 2112, tiling)  # neither rows nor columns divide by the tiles


@pytest.mark.parametrize("num_tokens", (1, 16, 32))
def test_head_over_a_large_vocabulary(num_tokens: int) -> None:
    x, norm, weight = normal(num_tokens, 2048), normal(2048), normal(128256, 2048, scale=2048**-0.5)
    check_contract(skinny_linear.norm_linear, ReferenceOps().norm_linear, None, x, norm, weight, EPS)


@pytest.mark.parametrize("num_tokens", (5, 16, 30))
def test_the_residual_may_be_the_result(num_tokens: int) -> None:
    x, weight, residual = normal(num_tokens, 512), normal(1024, 512), normal(num_tokens, 1024)
    torch.cuda.synchronize()
    expected = skinny_linear.linear_add(x, weight, residual)
    skinny_linear.linear_add(x, weight, residual, out=residual)
    assert torch.equal(residual, expected)


def test_zero_rows_are_not_divided_by() -> None:
    x = torch.zeros(3, 256, dtype=torch.bfloat16, device="cuda")
    norm, weight = normal(256), normal(512, 256)
    torch.cuda.synchronize()
    assert torch.equal(skinny_linear.norm_linear(x, norm, weight, EPS), torch.zeros_like(x).repeat(1, 2))


@pytest.mark.parametrize("num_tokens", (3, 16, 32))
def test_a_chain_in_a_graph_gives_the_same_bits(num_tokens: int) -> None:
    """Every kernel starts before its predecessor has ended, and must not read what that still writes."""
    layers = [
        (normal(512), normal(1024, 512, scale=0.05), normal(512, 512, scale=0.05), normal(2048, 512, scale=0.05))
        for _ in range(6)
    ]
    downs = [normal(512, 1024, scale=0.03) for _ in layers]
    x = normal(num_tokens, 512)

    def chain() -> torch.Tensor:
        y = x
        for (norm, qkv, o, gate_up), down in zip(layers, downs, strict=True):
            attn = skinny_linear.norm_linear(y, norm, qkv, EPS)[:, :512].contiguous()
            y = skinny_linear.linear_add(attn, o, y)
            y = skinny_linear.linear_add(skinny_linear.norm_swiglu(y, norm, gate_up, EPS), down, y)
        return y

    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.synchronize()
    expected = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, expected)
        x.copy_(normal(num_tokens, 512))
        expected = chain()
