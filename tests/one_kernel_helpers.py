"""Checks of a family of one-kernel products on a GPU: `skinny_linear` and `batch_linear` must pass the same."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from llama3.ops.reference import ReferenceOps
from tests.numerics import assert_within_contract

EPS = 1e-5
# Rows and size: 1B's, 3B's and 8B's products, and sizes that divide by little.
SHAPES = ((3072, 2048), (2048, 8192), (5120, 3072), (4096, 14336), (48, 64), (1040, 704), (2064, 320))
UNEVEN = (1040, 2112)  # neither rows nor columns divide by the tiles

How = dict[str, Any]  # keyword arguments: how to cut the product; none: the family's own choice


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(torch.bfloat16)


def check_contract(
    kernel: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    how: How,
    *inputs: torch.Tensor | float,
) -> None:
    torch.cuda.synchronize()  # weights must not have been written by the kernel just before
    result = kernel(*inputs, **how)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]
    assert_within_contract(result, reference(*wide), reference(*inputs))
    assert torch.equal(result, kernel(*inputs, **how))


def norm_linear(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return ReferenceOps().norm_linear(x, None, weight, eps)


def norm_swiglu(x: torch.Tensor, gate_up: torch.Tensor, eps: float) -> torch.Tensor:
    return ReferenceOps().norm_swiglu(x, None, gate_up, eps)


def check_all(family: ModuleType, num_tokens: int, num_rows: int, size: int, how: How) -> None:
    x, weight = normal(num_tokens, size, scale=3), normal(num_rows, size, scale=size**-0.5)
    check_contract(family.norm_linear, norm_linear, how, x, weight, EPS)
    residual = normal(num_tokens, num_rows)
    check_contract(family.linear_add, ReferenceOps().linear_add, how, x, weight, residual)
    check_swiglu(family, num_tokens, num_rows, size, how)


def check_swiglu(family: ModuleType, num_tokens: int, num_rows: int, size: int, how: How) -> None:
    x, weight = normal(num_tokens, size, scale=3), normal(num_rows, size, scale=size**-0.5)
    check_contract(family.norm_swiglu, norm_swiglu, how, x, weight, EPS)


def check_squares(result: torch.Tensor, squares: torch.Tensor) -> None:
    """That they are sums of those of what a product has made."""
    torch.testing.assert_close(squares.double().sum(0), result.double().square().sum(1), rtol=1e-6, atol=1e-30)


def check_many_repeats(family: ModuleType, num_tokens: int, num_rows: int, size: int) -> None:
    """Weights in L2, so that the ring turns as fast as it can: a stage must not be filled while it is still read."""
    x, weight = normal(num_tokens, size), normal(num_rows, size, scale=size**-0.5)
    residual = normal(num_tokens, num_rows)
    torch.cuda.synchronize()
    for kernel, inputs in (
        (family.linear_add, (x, weight, residual)),
        (family.norm_linear, (x, weight, EPS)),
        (family.norm_swiglu, (x, weight, EPS)),
    ):
        expected = kernel(*inputs)
        wrong = sum((kernel(*inputs) != expected).any().int() for _ in range(500))
        assert int(wrong) == 0, f"{int(wrong)} of 500 repeats differ"


def check_head(family: ModuleType, num_tokens: int) -> None:
    x, weight = normal(num_tokens, 2048), normal(128256, 2048, scale=2048**-0.5)
    check_contract(family.norm_linear, norm_linear, {}, x, weight, EPS)


def check_residual_as_result(family: ModuleType, num_tokens: int) -> None:
    x, weight, residual = normal(num_tokens, 512), normal(1024, 512), normal(num_tokens, 1024)
    torch.cuda.synchronize()
    expected = family.linear_add(x, weight, residual)
    family.linear_add(x, weight, residual, out=residual)
    assert torch.equal(residual, expected)


def check_zero_rows(family: ModuleType) -> None:
    x = torch.zeros(3, 256, dtype=torch.bfloat16, device="cuda")
    weight = normal(512, 256)
    torch.cuda.synchronize()
    assert torch.equal(family.norm_linear(x, weight, EPS), torch.zeros_like(x).repeat(1, 2))


def check_chain_in_a_graph(family: ModuleType, num_tokens: int) -> None:
    layers = [
        (normal(1024, 512, scale=0.05), normal(512, 512, scale=0.05), normal(2048, 512, scale=0.05)) for _ in range(6)
    ]
    downs = [normal(512, 1024, scale=0.03) for _ in layers]
    x = normal(num_tokens, 512)

    def chain() -> torch.Tensor:
        y, squares = x, None
        for (qkv, o, gate_up), down in zip(layers, downs, strict=True):
            attn = family.norm_linear(y, qkv, EPS, squares)[:, :512].contiguous()
            y, squares = family.linear_add_squares(attn, o, y)
            mid = family.norm_swiglu(y, gate_up, EPS, squares)
            y, squares = family.linear_add_squares(mid, down, y)
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
