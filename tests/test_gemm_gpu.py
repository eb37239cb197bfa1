"""The large products against the reference ops in fp64, within the numerics contract of the design."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama3.errors import UserError
from llama3.ops import gemm, gemm_search, linear
from llama3.ops.reference import ReferenceOps
from tests.numerics import assert_within_contract

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper", "poisoned_allocations")]
COUNTS = (1, 63, 64, 65, 128, 129, 255, 257, 1000, 4099)  # a block takes 128 tokens by default, a cluster 256
# N, K of 1B, 3B and 8B, and sizes that divide by little.
SIZES = ((3072, 2048), (2048, 8192), (5120, 3072), (4096, 14336), (16384, 2048), (264, 72), (16, 8), (1000, 328))
DTYPES = (torch.bfloat16, torch.float16)

EDGE_COUNTS = (1, 129, 200, 256, 257, 450, 513)
PRODUCT_PLANS = sorted({*gemm.PLANS[gemm.PLAIN], *gemm.PLANS[gemm.RESIDUAL]})
SPLIT_PLANS = [plan for plan in PRODUCT_PLANS if plan.splits > 1]
DECODE_SIZES = ((6144, 4096), (4096, 4096), (4096, 14336))  # qkv, o and down of 8B


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


def edge_sizes(plan: gemm.Plan) -> list[tuple[int, int]]:
    """N, K: a tile and a bit, less than a box, several tiles; the shortest parts, uneven ones, longer than the ring."""
    shortest = (plan.splits - 1) * 64 + 8
    return [(plan.rows + 8, shortest), (8, 520), (1000, 1096), (3 * plan.rows - 56, 2048)]


@pytest.mark.parametrize("num_tokens", EDGE_COUNTS)
@pytest.mark.parametrize("plan", PRODUCT_PLANS)
def test_product_plans(plan: gemm.Plan, num_tokens: int) -> None:
    dtype = torch.bfloat16
    for num_rows, size in edge_sizes(plan):
        x = inside(normal(num_tokens, size, dtype=dtype))
        weight = inside(normal(num_rows, size, dtype=dtype, scale=size**-0.5))
        residual = inside(normal(num_tokens, num_rows, dtype=dtype))
        exact = x.double() @ weight.double().T
        if plan in gemm.PLANS[gemm.PLAIN]:
            result = gemm.product(x, weight, plan=plan)
            assert_within_contract(result, exact, x @ weight.T)
            assert plan.splits > 1 or torch.equal(result, gemm.product(x, weight))  # the same sums in the same order
        if plan in gemm.PLANS[gemm.RESIDUAL]:
            result = gemm.product(x, weight, residual, plan=plan)
            plain = ReferenceOps().linear_add(x, weight, residual)
            assert_within_contract(result, exact + residual.double(), plain)
            assert plan.splits > 1 or torch.equal(result, gemm.product(x, weight, residual))
            assert torch.equal(gemm.product(x, weight, residual, residual, plan), result)  # in place
            assert torch.equal(residual, result)


@pytest.mark.parametrize("plan", gemm.PLANS[gemm.SWIGLU][1:])
@pytest.mark.parametrize("num_tokens", EDGE_COUNTS)
def test_swiglu_plans(num_tokens: int, plan: gemm.Plan) -> None:
    dtype = torch.bfloat16
    for num_rows, size in ((28672, 4096), (16, 8), (208, 72), (240, 328), (2000, 328), (4480, 1096)):
        x, weight = normal(num_tokens, size, dtype=dtype), normal(num_rows, size, dtype=dtype, scale=2 * size**-0.5)
        expected = gemm.swiglu(x, weight, gemm.WHOLE)
        result = gemm.swiglu(inside(x), inside(weight), plan)
        assert_within_contract(result, silu_mul(x.double() @ weight.double().T), silu_mul(x @ weight.T))
        assert torch.equal(result, expected) and torch.equal(gemm.swiglu(x, weight), expected)


@pytest.mark.parametrize("size", (8, 72, 136, 200, 328))
def test_tiles_of_fewer_steps_than_the_ring_has_stages(size: int) -> None:
    """Many for each cluster, so that several are in the ring at once."""
    x, weight = normal(2050, size, dtype=torch.bfloat16), normal(16400, size, dtype=torch.bfloat16, scale=size**-0.5)
    residual, exact = normal(2050, 16400, dtype=torch.bfloat16), x.double() @ weight.double().T
    products = {plan: gemm.product(x, weight, plan=plan) for plan in PRODUCT_PLANS if plan.splits == 1}
    added = {plan: gemm.product(x, weight, residual, plan=plan) for plan in products}
    activated = {plan: gemm.swiglu(x, weight, plan) for plan in gemm.PLANS[gemm.SWIGLU]}
    assert_within_contract(products[gemm.WHOLE], exact, x @ weight.T)
    assert_within_contract(added[gemm.WHOLE], exact + residual.double(), ReferenceOps().linear_add(x, weight, residual))
    assert_within_contract(activated[gemm.WHOLE], silu_mul(exact), silu_mul(x @ weight.T))
    for results in (products, added, activated):
        assert all(torch.equal(result, results[gemm.WHOLE]) for result in results.values())


@pytest.mark.parametrize(
    ("epilogue", "plan"),
    [(gemm.SWIGLU, plan) for plan in gemm.PLANS[gemm.SWIGLU]] + [(gemm.PLAIN, plan) for plan in gemm.PLANS[gemm.PLAIN]],
)
def test_no_plan_writes_beyond_the_output(epilogue: int, plan: gemm.Plan) -> None:
    x, weight = normal(130, 512, dtype=torch.bfloat16), normal(272, 512, dtype=torch.bfloat16)
    storage = torch.full((140 * 272,), torch.nan, dtype=torch.bfloat16, device="cuda")
    workspace = gemm._workspace(x.device)
    gemm.library().gemm(
        *(x.data_ptr(), weight.data_ptr(), 0, storage.data_ptr()),
        *(130, 272, 512, epilogue, 0),
        stream=torch.cuda.current_stream().cuda_stream,
        workspace=workspace.data_ptr(),
        workspace_bytes=workspace.nbytes,
        **plan._asdict(),
    )
    written, size = ~storage.isnan(), 130 * 272 // (2 if epilogue == gemm.SWIGLU else 1)
    assert written[:size].all() and not written[size:].any()


def split_products(sizes: tuple[tuple[int, int], ...]) -> list[tuple[int, int, gemm.Plan]]:
    """Those with all their parts at once on this GPU, at 256 tokens."""
    at_once = gemm.clusters_at_once(torch.device("cuda", torch.cuda.current_device()))
    found = [(*size, plan) for size in sizes for plan in SPLIT_PLANS]
    return [(n, k, plan) for n, k, plan in found if -(-n // plan.rows) * plan.splits <= at_once]


def test_sums_of_parts_are_repeatable() -> None:
    """Launches that overlap, and use the same workspace."""
    for num_rows, size, plan in split_products(DECODE_SIZES):
        x, weight = normal(256, size, dtype=torch.bfloat16), normal(num_rows, size, dtype=torch.bfloat16, scale=0.02)
        expected = gemm.product(x, weight, plan=plan)
        assert_within_contract(expected, x.double() @ weight.double().T, x @ weight.T)
        outs = list(torch.empty(200, 256, num_rows, dtype=torch.bfloat16, device="cuda"))
        for out in outs:
            gemm.product(x, weight, out=out, plan=plan)
        assert all(torch.equal(out, expected) for out in outs)
        counters = gemm._workspace(x.device)[: 1 << 14]
        assert not counters.any()


@pytest.mark.parametrize("plan", SPLIT_PLANS)
def test_parts_pass_on_what_is_not_finite(plan: gemm.Plan) -> None:
    x, weight = normal(256, 2048, dtype=torch.bfloat16), normal(1024, 2048, dtype=torch.bfloat16)
    x[3, 5], x[200, 2047], weight[77, 1300] = torch.inf, torch.nan, torch.nan
    expected, result = x.float() @ weight.float().T, gemm.product(x, weight, plan=plan)
    assert torch.equal(result.isnan(), expected.isnan()) and torch.equal(result.isinf(), expected.isinf())


def test_products_in_parts_follow_one_another_in_a_graph() -> None:
    """Each reads what its predecessor writes, and takes over its workspace, launched before that one has ended."""
    plans = [gemm.Plan(128, 2), gemm.Plan(256, 4), gemm.Plan(256, 2)] * 4
    weights = [normal(4096, 4096, dtype=torch.bfloat16, scale=4096**-0.5) for _ in range(3)]
    wide = normal(6144, 4096, dtype=torch.bfloat16, scale=4096**-0.5)
    narrow = normal(4096, 6144, dtype=torch.bfloat16, scale=6144**-0.5)
    start = normal(256, 4096, dtype=torch.bfloat16, scale=0.1)
    hidden = torch.empty(len(plans) + 1, 256, 4096, dtype=torch.bfloat16, device="cuda")
    qkv = torch.empty(len(plans), 256, 6144, dtype=torch.bfloat16, device="cuda")

    def chain(after_each: Callable[[], None]) -> None:
        hidden[0].copy_(start)
        for i, plan in enumerate(plans):
            gemm.product(hidden[i], weights[i % 3], hidden[i], hidden[i + 1], plan)
            after_each()
            gemm.product(hidden[i + 1], wide, out=qkv[i], plan=gemm.Plan(192, 2))
            after_each()
            gemm.product(qkv[i], narrow, hidden[i + 1], hidden[i + 1], plan)
            after_each()
            gemm.swiglu(hidden[i + 1], wide)  # not in parts
            gemm.product(hidden[i + 1].clone(), weights[1], hidden[i + 1], hidden[i + 1], gemm.WHOLE)
            after_each()
            hidden[i + 1].mul_(0.25)

    chain(torch.cuda.synchronize)
    expected = hidden.clone(), qkv.clone()
    assert all(torch.isfinite(tensor).all() for tensor in expected)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for _ in range(100):
        hidden.fill_(torch.nan), qkv.fill_(torch.nan)
        graph.replay()
        assert torch.equal(hidden, expected[0]) and torch.equal(qkv, expected[1])


# Tokens, N, K of products with so many tiles that clusters claim them, over 16 steps of K, the fewest for that, and
# more, between others whose clusters do not: of few tiles, of 15 steps.
CLAIMED = ((4608, 6144, 1024), (256, 28672, 4096), (4226, 4096, 2048), (2050, 8208, 960), (1600, 16400, 14336))


@pytest.mark.parametrize("plan", (None, gemm.WIDE, gemm.Plan(128)))
def test_every_tile_is_made_once_however_products_follow_each_other(plan: gemm.Plan | None) -> None:
    """Each starts before the one before has ended, whose claims it must not see."""
    of_swiglu = plan if plan in gemm.PLANS[gemm.SWIGLU] else None
    operands = [
        (
            normal(num_tokens, size, dtype=torch.bfloat16),
            normal(num_rows, size, dtype=torch.bfloat16, scale=size**-0.5),
        )
        for num_tokens, num_rows, size in CLAIMED
    ]

    def run_all() -> list[torch.Tensor]:
        results = []
        for x, weight in operands:
            residual = torch.ones(len(x), len(weight), dtype=torch.bfloat16, device="cuda")
            results += [gemm.product(x, weight, plan=plan), gemm.swiglu(x, weight, of_swiglu)]
            results += [gemm.product(x, weight, residual, plan=plan)]
        return results

    expected = run_all()
    for (x, weight), plain, activated, added in zip(
        operands, expected[::3], expected[1::3], expected[2::3], strict=True
    ):
        exact = x.double() @ weight.double().T
        assert_within_contract(plain, exact, x @ weight.T)
        assert_within_contract(activated, silu_mul(exact), silu_mul(x @ weight.T))
        assert_within_contract(added, exact + 1, x @ weight.T + 1)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_all()
    for _ in range(20):
        for result in captured:
            result.fill_(torch.nan)
        graph.replay()
        assert all(map(torch.equal, captured, expected))


def test_too_many_parts_are_refused() -> None:
    """They would wait for each other for ever."""
    x, weight = normal(256, 512, dtype=torch.bfloat16), normal(16384, 512, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="makes 256 parts of 512 columns; expected at most"):
        gemm.product(x, weight, plan=gemm.Plan(128, 2))
    workspace, out = torch.zeros(1 << 26, dtype=torch.uint8, device="cuda"), x.new_empty(256, 16384)
    pointers = (x.data_ptr(), weight.data_ptr(), 0, out.data_ptr())
    with pytest.raises(ValueError, match="256 parts of tiles must run at once; this GPU has room for"):
        gemm.library().gemm(
            *(*pointers, 256, 16384, 512, gemm.PLAIN, 0),
            stream=torch.cuda.current_stream().cuda_stream,
            **gemm.Plan(128, 2)._asdict(),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace.nbytes,
        )


def test_plans_that_there_are_no_kernels_for() -> None:
    x, weight = normal(256, 512, dtype=torch.float16), normal(512, 512, dtype=torch.float16)
    with pytest.raises(UserError, match=r"there is no .*rows=128, splits=2.* in torch.float16; choose from"):
        gemm.product(x, weight, plan=gemm.Plan(128, 2))
    with pytest.raises(UserError, match=r"there is no .*rows=192"):
        gemm.swiglu(x.bfloat16(), weight.bfloat16(), gemm.Plan(192))


def test_the_search_runs_the_plan_it_picks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whichever is the fastest."""
    monkeypatch.setenv("LLAMA3_KERNEL_CACHE", str(tmp_path))
    for name in ("_decode_batches", "_first", "_measured"):
        monkeypatch.setattr(gemm_search, name, type(getattr(gemm_search, name))())
    gemm_search.expect_decode(256)
    for num_rows, size in DECODE_SIZES[:2]:
        x, weight = normal(256, size, dtype=torch.bfloat16), normal(num_rows, size, dtype=torch.bfloat16, scale=0.02)
        plans = gemm.plans_for(gemm.PLAIN, x, weight)
        assert plans
        for i in range(len(plans)):
            monkeypatch.setattr(gemm_search, "fastest", lambda ways, x, weight, i=i: len(ways) - 1 - i)
            monkeypatch.setattr(gemm_search, "_measured", {})
            gemm_search.cache_path().unlink(missing_ok=True)
            result = linear.product(x, weight)
            assert list(gemm_search._measured.values()) == [plans[-1 - i]]
            assert torch.equal(result, gemm.product(x, weight, plan=plans[-1 - i]))


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
