"""The large products against the reference ops in fp64, within the numerics contract of the design."""

import json
from pathlib import Path

import pytest
import torch

from llama3.ops import gemm, gemm_search, linear
from llama3.ops.reference import ReferenceOps
from tests.numerics import assert_within_contract

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper", "poisoned_allocations")]
COUNTS = (1, 63, 64, 65, 128, 129, 255, 257, 1000, 4099)  # a block takes 128 tokens, a cluster 256
# N, K of 1B, 3B and 8B, and sizes that divide by little.
SIZES = ((3072, 2048), (2048, 8192), (5120, 3072), (4096, 14336), (16384, 2048), (264, 72), (16, 8), (1000, 328))
DTYPES = (torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def inside(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with NaN before and behind, so that reads beyond it show."""
    size, around = tensor.numel(), 1 << 16
    storage = torch.full((size + 2 * around,), torch.nan, dtype=tensor.dtype, device="cuda")
    storage[around : around + size] = tensor.flatten()
    return storage[around : around + size].view(tensor.shape)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.unflatten(1, (-1, 2, 8)).unbind(2)
    return (torch.nn.functional.silu(gate) * up).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), SIZES)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_product(num_tokens: int, num_rows: int, size: int, dtype: torch.dtype) -> None:
    x = inside(normal(num_tokens, size, dtype=dtype))
    weight = inside(normal(num_rows, size, dtype=dtype, scale=size**-0.5))
    residual = inside(normal(num_tokens, num_rows, dtype=dtype))
    exact = x.double() @ weight.double().T
    result = gemm.product(x, weight)
    assert_within_contract(result, exact, x @ weight.T)
    assert torch.equal(result, gemm.product(x, weight))
    result = gemm.product(x, weight, residual)
    plain = ReferenceOps().linear_add(x, weight, residual)
    assert_within_contract(result, exact + residual.double(), plain)
    assert torch.equal(result, gemm.product(x, weight, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), [(16384, 2048), (28672, 4096), (272, 72), (16, 8), (2000, 328)])
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_swiglu(num_tokens: int, num_rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = normal(num_tokens, size, dtype=dtype), normal(num_rows, size, dtype=dtype, scale=2 * size**-0.5)
    result = gemm.swiglu(inside(x), inside(weight))
    assert_within_contract(result, silu_mul(x.double() @ weight.double().T), silu_mul(x @ weight.T))
    assert torch.equal(result, gemm.swiglu(x, weight))


def test_large_gates_saturate() -> None:
    """silu goes to 0 and to the identity; no overflow on the way."""
    x = torch.eye(16, dtype=torch.bfloat16, device="cuda")
    gates = torch.tensor([-200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0, 3e4], device="cuda").to(torch.bfloat16)
    weight = torch.cat((gates[:, None].expand(8, 16), torch.ones(8, 16, device="cuda", dtype=torch.bfloat16)))
    expected = torch.nn.functional.silu(gates.double()).expand(16, 8)
    torch.testing.assert_close(gemm.swiglu(x, weight.contiguous()).double(), expected, rtol=2**-8, atol=1e-30)


def test_nothing_is_written_beyond_the_output() -> None:
    x, weight = normal(130, 128, dtype=torch.bfloat16), normal(264, 128, dtype=torch.bfloat16)
    storage = torch.full((140 * 264,), torch.nan, dtype=torch.bfloat16, device="cuda")
    pointers = (x.data_ptr(), weight.data_ptr(), 0, storage.data_ptr())
    gemm.library().gemm(*pointers, 130, 264, 128, gemm.PLAIN, 0, stream=torch.cuda.current_stream().cuda_stream)
    written = ~storage.isnan()
    assert written[: 130 * 264].all() and not written[130 * 264 :].any()


@pytest.mark.parametrize("num_tokens", (130, 256))
def test_what_a_search_picks_is_right(num_tokens: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also under a graph, and read back from disk."""
    monkeypatch.setenv("LLAMA3_KERNEL_CACHE", str(tmp_path))
    for name in ("_decode_batches", "_first", "_measured", "_fused"):
        monkeypatch.setattr(gemm_search, name, type(getattr(gemm_search, name))())
    gemm_search.expect_decode(num_tokens)
    x, norm = normal(num_tokens, 1024, dtype=torch.bfloat16), torch.ones(1024, dtype=torch.bfloat16, device="cuda")
    gate_up = normal(4096, 1024, dtype=torch.bfloat16, scale=2 * 1024**-0.5)
    down = normal(1024, 2048, dtype=torch.bfloat16, scale=2048**-0.5)
    ops = ReferenceOps()
    mid, plain = linear.norm_swiglu(x, norm, gate_up, 1e-5), ops.norm_swiglu(x, norm, gate_up, 1e-5)
    assert_within_contract(mid, ops.norm_swiglu(*(t.double() for t in (x, norm, gate_up)), 1e-5), plain)
    result = linear.linear_add(mid, down, x)
    exact = mid.double() @ down.double().T + x.double()
    assert_within_contract(result, exact, ops.linear_add(mid, down, x))
    assert len(json.loads(gemm_search.cache_path().read_text())) in (2, 3)  # SwiGLU, perhaps its product, down
    monkeypatch.setattr(gemm_search, "_measured", {})
    monkeypatch.setattr(gemm_search, "_fused", {})
    monkeypatch.setattr(gemm_search, "fastest", None)
    assert torch.equal(linear.linear_add(linear.norm_swiglu(x, norm, gate_up, 1e-5), down, x), result)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = linear.linear_add(linear.norm_swiglu(x, norm, gate_up, 1e-5), down, x)
    graph.replay()
    assert torch.equal(replayed, result)


def test_replay_in_a_graph_after_other_kernels() -> None:
    """Launched before its predecessor has ended, it must not read what that one still writes."""
    x, weight = normal(2048, 2048, dtype=torch.bfloat16), normal(2048, 2048, dtype=torch.bfloat16, scale=2048**-0.5)
    expected = x
    for _ in range(4):
        expected = gemm.product(expected, weight, expected)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(4):
            y = gemm.product(y, weight, y)
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
