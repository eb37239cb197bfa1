"""The decode-attention kernels against fp64 PyTorch, on a GPU. The kernel always runs before the reference."""

from __future__ import annotations

import pytest
import torch
from decode_attn_helpers import BLOCK, Case, assert_close, error, make_case, truth, with_batch

from llama3.ops import decode_attn as ops
from llama3.ops.elementwise import can_overlap

pytestmark = pytest.mark.gpu

BATCHES = (1, 2, 4, 8, 16, 17, 24, 32, 33, 64, 128, 256, 512)
CONTEXTS = (1, 15, 16, 17, 63, 64, 65, 127, 128, 1000, 4096, 32768, 131072)
HEADS = {1: (4, 4), 2: (8, 4), 3: (24, 8), 4: (32, 8), 8: (64, 8)}  # ratio -> query heads, kv heads
# The only trimming: so many different tokens at a time. Where batch x context is more, rows share sequences, through
# the slots or the block table; each row has its own query, and the kernel does the work of the full batch.
DISTINCT_TOKENS = 1 << 18


def run(case: Case, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, both dirty before; checks that the workspace is ready for the next call."""
    workspace = ops.make_workspace("cuda")
    clean = workspace.clone()
    out = torch.full_like(case.q, float("nan"))
    lse = torch.full(case.q.shape[:2], float("nan"), device="cuda")
    ops.decode_attn(
        case.q, case.k_cache, case.v_cache, case.lengths, **case.rows, out=out, lse=lse, workspace=workspace, **options
    )
    torch.cuda.synchronize()
    assert_ready(workspace, clean, 1)
    return out, lse


def assert_ready(workspace: torch.Tensor, clean: torch.Tensor, launches: int) -> None:
    """All ranges have counted the launches, and the next one's buffer is empty: 16 bytes are if their first word is."""
    size = ops.library().partial_floats
    ranges, fresh = (words.view(-1, ops.library().range_floats) for words in (workspace, clean))
    assert ranges[:, 2 * size].tolist() == [launches] * len(ranges)
    begin = launches % 2 * size
    assert torch.equal(ranges[:, begin : begin + size : 4], fresh[:, begin : begin + size : 4])


def compare(case: Case, out, lse, expected_out, expected_lse) -> float:
    found = assert_close(out, case, expected_out)
    finite = torch.isfinite(expected_lse)
    assert torch.equal(lse == float("-inf"), ~finite)
    assert (lse.double() - expected_lse)[finite].abs().max().item() < 2e-3 if finite.any() else True
    return found


def check(case: Case, **options) -> float:
    return compare(case, *run(case, **options), *truth(case))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("ratio", list(HEADS))
def test_matrix(ratio, head_dim, paged):
    for context in CONTEXTS:
        sequences = min(max(BATCHES), DISTINCT_TOKENS // context)
        pool = make_case(
            [context] * sequences,
            *HEADS[ratio],
            head_dim,
            paged=paged,
            shuffled_slots=True,
            spare_blocks=1,
            seed=context,
        )
        for batch in BATCHES:
            case = with_batch(pool, batch)
            results = {version: run(case, version=version) for version in ("ring", "tma")}
            expected = truth(case)
            for version, result in results.items():
                try:
                    compare(case, *result, *expected)
                except AssertionError as failure:
                    raise AssertionError(f"{version}, batch {batch}, context {context}: {failure}") from failure


RAGGED = {
    "one long": [65536] + [4096] * 31,
    "two lengths": [128, 4096] * 16,
    "zero rows": [0, 700, 0, 0, 64, 1, 0],
    "all zero": [0, 0, 0],
    "negative": [-1, 5, -1000, 200],
    "every length": list(range(130)),
    "growing": [17 * i for i in range(300)],
}


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("lengths", list(RAGGED.values()), ids=list(RAGGED))
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 2, 64)])
def test_ragged(lengths, paged, heads):
    check(make_case(lengths, *heads, paged=paged, spare_blocks=2))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fp16_strides_and_scale(head_dim):
    case = make_case([300, 64, 1], 32, 8, head_dim, dtype=torch.float16, strided=True)
    wide = torch.full((3, 40, head_dim + 32), float("nan"), device="cuda", dtype=torch.float16)
    wide[:, 4:36, 16 : 16 + head_dim] = case.q
    case.q = wide[:, 4:36, 16 : 16 + head_dim]
    target = torch.full_like(wide, float("nan"))
    out = target[:, 4:36, 16 : 16 + head_dim]
    ops.decode_attn(case.q, case.k_cache, case.v_cache, case.lengths, **case.rows, scale=0.3, out=out)
    assert error(out, truth(case, scale=0.3)[0]) < 2e-3
    target[:, 4:36, 16 : 16 + head_dim] = float("nan")
    assert target.isnan().all()  # nothing outside `out` was written


def test_repeats_are_bitwise_equal_and_grids_agree():
    case = make_case([4097, 64, 20000, 1, 3000], 32, 8, 128)
    first, _ = run(case)
    for _ in range(100):
        assert torch.equal(run(case)[0], first)
    reference = truth(case)[0]
    for grid in (1, 2, 7, 60, 131):
        assert_close(run(case, grid=grid)[0], case, reference)
    for min_tiles in (2, 5, 100):
        assert_close(run(case, min_tiles=min_tiles)[0], case, reference)


def test_one_workspace_serves_all_grids():
    case = make_case([3000, 10, 700, 0], 32, 8, 128)
    reference, workspace = truth(case)[0], ops.make_workspace("cuda")
    clean = workspace.clone()
    for launches, grid in enumerate((0, 5, 0, 0, 60, 1, 2, 0, 131, 0), 1):
        out = ops.decode_attn(
            case.q, case.k_cache, case.v_cache, case.lengths, **case.rows, workspace=workspace, grid=grid
        )
        torch.cuda.synchronize()
        assert_close(out, case, reference)
        assert_ready(workspace, clean, launches)


def test_one_graph_serves_all_lengths():
    case = make_case([8192] * 9, 32, 8, 128)
    out = torch.empty_like(case.q)
    workspace = ops.make_workspace("cuda")

    def step():
        ops.decode_attn(case.q, case.k_cache, case.v_cache, case.lengths, **case.rows, out=out, workspace=workspace)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([1] * 9, [8192, 0, 64, 65, 4000, 1, 0, 128, 8191], [8192] * 9, [0] * 9, [63] * 9):
        case.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, truth(case)[0]) < 6e-3 if any(lengths) else bool((out == 0).all())


def test_two_streams_at_once():
    cases = [make_case([5000, 300, 17000], 32, 8, 128, seed=s) for s in (1, 2)]
    expected = [run(c)[0] for c in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    outs = [[torch.empty_like(c.q) for _ in range(200)] for c in cases]
    torch.cuda.synchronize()
    for i in range(200):
        for stream, case, out in zip(streams, cases, outs, strict=True):
            with torch.cuda.stream(stream):
                ops.decode_attn(case.q, case.k_cache, case.v_cache, case.lengths, **case.rows, out=out[i])
    torch.cuda.synchronize()
    for want, got in zip(expected, outs, strict=True):
        assert all(torch.equal(want, x) for x in got)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_overlapping_launches_wait_for_each_other(head_dim):
    cases = [
        make_case([200, 64, 1, 130], 32, 8, head_dim, seed=1),
        make_case([256, 3, 65, 128], 32, 8, head_dim, paged=True, seed=2),
        make_case([9, 70, 4000, 17], 32, 8, head_dim, paged=True, spare_blocks=3, seed=3),
    ]

    workspace = ops.make_workspace("cuda")

    def chain(pdl):  # each launch reads what the one before it wrote: queries, and the state in the workspace
        q, outs = cases[0].q, []
        for i in range(300):
            case = cases[i % len(cases)]
            q = ops.decode_attn(
                q, case.k_cache, case.v_cache, case.lengths, **case.rows, scale=3.0, workspace=workspace, pdl=pdl
            )
            outs.append(q)
        return torch.stack(outs)

    alone = chain(False)
    graph = torch.cuda.CUDAGraph()  # launched by the host one by one, they would not come close enough to overlap
    with torch.cuda.graph(graph):
        overlapping = chain(can_overlap(torch.device("cuda")))
    for _ in range(5):
        overlapping.fill_(float("nan"))
        graph.replay()
        assert torch.equal(overlapping, alone)
    assert alone.isfinite().all()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.float().chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


@pytest.mark.parametrize("version", ["ring", "tma"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("heads", [(32, 8, 128), (32, 8, 64), (24, 8, 128), (8, 1, 64), (4, 4, 128)])
def test_rope_append_decode(heads, paged, version):
    num_heads, num_kv_heads, head_dim = heads
    positions = [0, 5, -1, 63, 64, 4095, 127, 128, -7, 1000, 0, 20000]
    case = make_case(positions, *heads, paged=paged, shuffled_slots=True, spare_blocks=1)
    batch = len(positions)
    qkv = torch.randn(batch, (num_heads + 2 * num_kv_heads) * head_dim, device="cuda").bfloat16()
    angle = torch.arange(20001, device="cuda")[:, None] * 10000.0 ** (
        -torch.arange(head_dim // 2, device="cuda") / (head_dim // 2)
    )
    cos, sin = angle.cos().contiguous(), angle.sin().contiguous()
    before = case.k_cache.clone(), case.v_cache.clone()
    out = torch.full((batch, num_heads * head_dim), float("nan"), device="cuda").bfloat16()
    ops.rope_append_decode(
        qkv, cos, sin, case.k_cache, case.v_cache, case.lengths, **case.rows, out=out, version=version
    )
    torch.cuda.synchronize()

    q, k, v = qkv.view(batch, -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], 1)
    for row, position in enumerate(positions):
        if position < 0:
            continue
        block, token = case.blocks[row, position // BLOCK], position % BLOCK
        before[0][block, :, token] = _rotate(k[row], cos[position], sin[position])
        before[1][block, :, token] = v[row]
    # the appended key may differ from PyTorch's in the last bit: fused multiply-add
    assert torch.equal(case.v_cache.view(torch.int16), before[1].view(torch.int16))
    assert torch.equal(case.k_cache.isnan(), before[0].isnan())
    assert (case.k_cache.nan_to_num() - before[0].nan_to_num()).abs().max() <= 0.032

    case.k_cache, case.v_cache = before
    case.q = torch.stack([_rotate(q[i], cos[max(p, 0)], sin[max(p, 0)]) for i, p in enumerate(positions)])
    case.lengths = torch.tensor([p + 1 for p in positions], dtype=torch.int32, device="cuda")
    assert_close(out.view(batch, num_heads, head_dim), case, truth(case)[0])
