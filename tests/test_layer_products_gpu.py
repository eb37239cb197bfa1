"""All products between two attentions in one launch, against the reference ops in fp64, within the numerics contract."""

import functools
from typing import Any

import pytest
import torch

from llama3.ops import layer_products as ops
from llama3.ops.reference import ReferenceOps
from tests.numerics import assert_within_contract
from tests.one_kernel_helpers import EPS, normal

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper", "poisoned_allocations")]
COUNTS = (1, 7, 8, 9, 16, 17, 31, 32, 33, 48, 64, 65, 100, 127, 128)
# attention's width, hidden size, feed-forward size, rows of what follows
SHAPES = {
    "1b": (2048, 2048, 8192, 3072),
    "3b": (3072, 3072, 8192, 5120),
    "8b": (4096, 4096, 14336, 6144),
    "tiny": (64, 64, 64, 16),
    "uneven": (192, 1088, 704, 1040),
    "wide": (128, 256, 40960, 128256),
}


def make(shape: str, num_tokens: int, with_next: bool = True) -> dict[str, Any]:
    attention, hidden, inner, following = SHAPES[shape]
    inputs: dict[str, Any] = {
        "attn": normal(num_tokens, attention),
        "residual": normal(num_tokens, hidden, scale=3),
        "o": normal(hidden, attention, scale=attention**-0.5),
        "mlp_norm": normal(hidden),
        "gate_up": normal(2 * inner, hidden, scale=hidden**-0.5),
        "down": normal(hidden, inner, scale=inner**-0.5),
        "eps": EPS,
    }
    if with_next:
        inputs |= {"next_norm": normal(hidden), "next_weight": normal(following, hidden, scale=hidden**-0.5)}
    torch.cuda.synchronize()  # weights must not have been written by the kernel just before
    return inputs


def reference(attn, residual, o, mlp_norm, gate_up, down, eps, next_norm=None, next_weight=None):
    seam = ReferenceOps()
    middle = seam.linear_add(attn, o, residual)
    hidden = seam.linear_add(seam.norm_swiglu(middle, mlp_norm, gate_up, eps), down, middle)
    return hidden, None if next_norm is None else seam.norm_linear(hidden, next_norm, next_weight, eps)


def check(inputs: dict[str, Any], **how: Any) -> None:
    results = ops.layer_products(**inputs, **how)
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    for result, truth, rounded in zip(results, reference(**wide), reference(**inputs), strict=True):
        assert (result is None) == (truth is None)
        if result is not None:
            assert_within_contract(result, truth, rounded)
    for again, result in zip(ops.layer_products(**inputs, **how), results, strict=True):
        assert again is result or torch.equal(again, result)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_matrix(num_tokens: int, shape: str) -> None:
    check(make(shape, num_tokens))


@pytest.mark.parametrize("num_tokens", (1, 40, 128))
def test_the_last_layer_has_nothing_behind_it(num_tokens: int) -> None:
    check(make("1b", num_tokens, with_next=False))


@pytest.mark.parametrize("blocks", (1, 2, 3, 31, 100, 131))
def test_any_number_of_blocks(blocks: int) -> None:
    check(make("uneven", 50), blocks=blocks)
    check(make("1b", 20), blocks=blocks)


@pytest.mark.parametrize("shape", ("1b", "8b", "uneven"))
@pytest.mark.parametrize("num_tokens", (12, 32, 64, 128))
def test_many_repeats_are_equal(num_tokens: int, shape: str) -> None:
    """Also of launches that overlap, in a graph, with dirty memory from other shapes in the workspace."""
    inputs, other = make(shape, num_tokens), make("uneven", 9, with_next=False)
    run = functools.partial(ops.layer_products, **inputs)
    expected = run()
    graph = torch.cuda.CUDAGraph()
    torch.utils.deterministic.fill_uninitialized_memory = False
    with torch.cuda.graph(graph):
        results = []
        for _ in range(20):
            results.append(run())
            ops.layer_products(**other)
    for _ in range(10):
        for pair in results:
            for tensor in pair:
                tensor.fill_(torch.nan)
        graph.replay()
        wrong = sum((tensor != want).any().int() for pair in results for tensor, want in zip(pair, expected, strict=True))
        assert int(wrong) == 0


@pytest.mark.parametrize("num_tokens", (16, 64))
def test_a_chain_of_layers_in_a_graph(num_tokens: int) -> None:
    """Every launch reads what the one before wrote, and starts before that has ended."""
    layers = [make("uneven", num_tokens) for _ in range(8)]

    def chain() -> torch.Tensor:
        hidden = layers[0]["residual"]
        for layer in layers:
            hidden, following = ops.layer_products(**(layer | {"residual": hidden}))
            hidden = hidden * 0.5 + following[:, :1]
        return hidden

    torch.utils.deterministic.fill_uninitialized_memory = False
    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain()
    for _ in range(20):
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, expected)


def test_two_streams_at_once() -> None:
    inputs = [make("1b", 24), make("1b", 64)]
    expected = [ops.layer_products(**i) for i in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list] = [[], []]
    for _ in range(20):
        for stream, given, kept in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(ops.layer_products(**given))
    torch.cuda.synchronize()
    for want, kept in zip(expected, results, strict=True):
        for got in kept:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
