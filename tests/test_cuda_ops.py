"""The CUDA ops against the reference ops in fp64, within the numerics contract of the design."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from llama3.forward_batch import DecodeBatch, PrefillBatch
from llama3.kv_cache import BLOCK_SIZE, LayerCache
from llama3.ops import elementwise, gemm_search, prefill_attention
from llama3.ops.cublaslt import Product
from llama3.ops.reference import ReferenceOps
from llama3.rope import RopeTable
from llama3.shapes import shape_config
from tests.numerics import ROUNDING_FLOOR, assert_within_contract

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_allocations")]
EPS = 1e-5
COUNTS = (1, 2, 4, 8, 16, 17, 33, 64, 65, 128, 300)
# Hidden and intermediate sizes: the bundled model, Llama 3.2 1B and 3B, Llama 3.1 8B, and one that divides by little.
SIZES = {"demo": (256, 768), "1b": (2048, 8192), "3b": (3072, 8192), "8b": (4096, 14336), "odd": (328, 1000)}
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def ops():
    from llama3.ops.cuda import CudaOps

    config, device = shape_config("tiny"), torch.device("cuda")
    assert CudaOps.why_not(config, torch.bfloat16, device) is None
    return CudaOps(config, device)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def check_contract(
    kernel: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], *inputs: torch.Tensor | float | None
) -> None:
    """The kernel errs at most twice what the reference op errs in its dtype, plus a rounding floor; and it repeats."""
    torch.cuda.synchronize()  # kernels read weights ahead: they must not have been written by the kernel just before
    result = kernel(*inputs)  # first: it must not find anything that the reference left behind
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    truth, plain = reference(*wide), reference(*inputs)
    assert_within_contract(result, truth, plain)
    assert torch.equal(result, kernel(*inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_norm_linear(ops, num_tokens: int, size: str, dtype: torch.dtype) -> None:
    hidden, _ = SIZES[size]
    x, norm = normal(num_tokens, hidden, dtype=dtype, scale=3), normal(hidden, dtype=dtype)
    weight = normal(hidden + hidden // 2, hidden, dtype=dtype, scale=hidden**-0.5)
    for norm_weight in (None, norm):
        check_contract(ops.norm_linear, ReferenceOps().norm_linear, x, norm_weight, weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_norm_swiglu(ops, num_tokens: int, size: str, dtype: torch.dtype) -> None:
    hidden, intermediate = SIZES[size]
    x, norm = normal(num_tokens, hidden, dtype=dtype, scale=0.1), normal(hidden, dtype=dtype)
    weight = normal(2 * intermediate, hidden, dtype=dtype, scale=2 * hidden**-0.5)
    for norm_weight in (None, norm):
        check_contract(ops.norm_swiglu, ReferenceOps().norm_swiglu, x, norm_weight, weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_linear_add(ops, num_tokens: int, size: str, dtype: torch.dtype) -> None:
    hidden, intermediate = SIZES[size]
    x, residual = normal(num_tokens, intermediate, dtype=dtype), normal(num_tokens, hidden, dtype=dtype)
    weight = normal(hidden, intermediate, dtype=dtype, scale=intermediate**-0.5)
    before = residual.clone()
    check_contract(ops.linear_add, ReferenceOps().linear_add, x, weight, residual)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (8, 2048, 4096, 16384))
@pytest.mark.parametrize("num_tokens", (1, 3, 300))
def test_sums_of_squares(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    x = normal(num_tokens, size, dtype=dtype, scale=3)
    squares = elementwise.sum_squares(x)
    torch.testing.assert_close(squares.double(), x.double().square().sum(1)[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_tokens", (1, 33, 256))
def test_head_over_a_large_vocabulary(ops, num_tokens: int) -> None:
    x, norm = normal(num_tokens, 2048, dtype=torch.bfloat16), normal(2048, dtype=torch.bfloat16)
    weight = normal(128256, 2048, dtype=torch.bfloat16, scale=2048**-0.5)
    check_contract(ops.norm_linear, ReferenceOps().norm_linear, x, norm, weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", (1, 16, 64, 256))
def test_every_algorithm_is_right(num_tokens: int, dtype: torch.dtype) -> None:
    """Whichever of cuBLASLt's candidates wins a search, with a residual and without."""
    num_rows, size = 2048, 2048
    x, weight = normal(num_tokens, size, dtype=dtype), normal(num_rows, size, dtype=dtype, scale=size**-0.5)
    residual, out = (
        normal(num_tokens, num_rows, dtype=dtype),
        torch.empty(num_tokens, num_rows, dtype=dtype, device="cuda"),
    )
    product = Product(num_tokens, num_rows, size, dtype, x.device)
    for algorithm in product.algorithms(gemm_search.CANDIDATES):
        for added in (None, residual):
            base = torch.zeros_like(residual) if added is None else added
            product.run(x, weight, added, out.fill_(torch.nan), algorithm)
            truth, plain = (
                ReferenceOps().linear_add(*t) for t in ([t.double() for t in (x, weight, base)], (x, weight, base))
            )
            assert_within_contract(out, truth, plain)


def test_a_search_leaves_results_within_the_contract(ops, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("LLAMA3_KERNEL_CACHE", str(tmp_path))
    gemm_search.expect_decode(140)  # more than the kernels for few tokens take
    x, weight = normal(140, 2048, dtype=torch.bfloat16), normal(3072, 2048, dtype=torch.bfloat16, scale=2048**-0.5)
    check_contract(ops.linear_add, ReferenceOps().linear_add, x, weight, normal(140, 3072, dtype=torch.bfloat16))
    assert len(json.loads(gemm_search.cache_path().read_text())) == 1


def test_operands_at_odd_addresses(ops) -> None:
    """Views into larger tensors, which the algorithms could not read as they lie."""
    x, residual = (normal(9, 264, dtype=torch.bfloat16)[1:, :256] for _ in range(2))
    weight = normal(257, 256, dtype=torch.bfloat16, scale=1 / 16)[1:]
    check_contract(ops.linear_add, ReferenceOps().linear_add, x, weight, residual)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("hidden_size", (8, 264, 2048, 8192))
@pytest.mark.parametrize("num_tokens", (1, 17, 128, 4097))
def test_embed(ops, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    table = normal(1000, hidden_size, dtype=dtype)
    ids = torch.randint(1000, (num_tokens,), device="cuda")
    ids[0], ids[-1] = 999, 0
    rows, squares = ops.embed(ids, table)
    assert torch.equal(rows, table[ids])
    assert (squares is None) == (num_tokens in (1, 4097))
    if squares is not None:
        torch.testing.assert_close(squares.double(), rows.double().square().sum(1)[None], rtol=1e-6, atol=0)


# ---- attention

HEADS = ((4, 4), (6, 2), (8, 2), (16, 2), (24, 8))  # query and key-value heads: ratios 1, 3, 4, 8, 3


def poisoned_cache(num_slots: int, max_len: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> LayerCache:
    blocks = -(-max_len // BLOCK_SIZE)
    shape = (num_slots * blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    return LayerCache(*torch.full((2, *shape), torch.nan, dtype=dtype, device="cuda").unbind(), blocks)


def widened(cache: LayerCache) -> LayerCache:
    return replace(cache, k=cache.k.double(), v=cache.v.double())


def rope_table(head_dim: int, num_positions: int) -> RopeTable:
    return RopeTable.build(replace(shape_config("1b"), head_dim=head_dim), num_positions, "cuda")


def run_attention(
    ops, batches: list, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, max_len: int, num_padding: int = 0
) -> None:
    """Several calls in a row over one cache, by all three: after each, outputs and cache contents must agree. Nobody
    reads the outputs of the last `num_padding` tokens."""
    num_heads, num_kv_heads = heads
    num_slots = 1 + max(int(batch.slots.max()) for batch in batches)
    caches = [poisoned_cache(num_slots, max_len, num_kv_heads, head_dim, dtype) for _ in range(3)]
    exact = widened(caches[2])
    rope = rope_table(head_dim, max_len)
    for batch in batches:
        qkv = normal(batch.positions.numel(), (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
        before = qkv.clone()
        result = ops.rope_append_attend(qkv, rope, caches[0], batch)
        assert torch.equal(qkv, before)
        repeat = ops.rope_append_attend(qkv, rope, caches[0], batch)  # appends the same once more, in the same place
        plain = ReferenceOps().rope_append_attend(qkv, rope, caches[1], batch)
        truth = ReferenceOps().rope_append_attend(qkv.double(), rope, exact, batch)
        read = slice(len(result) - num_padding)
        assert_within_contract(result[read], truth[read], plain[read])
        assert torch.equal(result, repeat)
    for mine, theirs in ((caches[0].k, exact.k), (caches[0].v, exact.v)):
        assert torch.equal(mine.isnan(), theirs.isnan()), "tokens were written where none belong"
        error = (mine.nan_to_num().double() - theirs.nan_to_num()).abs().max()
        assert error <= ROUNDING_FLOOR[dtype] * theirs.nan_to_num().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [(1,), (300,), (64, 64, 64), (1, 2, 63, 64, 65, 200), (7,) * 5])
def test_prefill(ops, lengths: tuple[int, ...], heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    slots = list(reversed(range(len(lengths))))
    batch = PrefillBatch.build(slots, lengths, [0] * len(lengths), "cuda")
    run_attention(ops, [batch], heads, head_dim, dtype, max_len=320)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_of_equal_prompts_by_cudnn(
    ops, monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(prefill_attention, "DENSE_MIN_FLOPS", 0)
    monkeypatch.setattr(prefill_attention, "attend_packed", None)
    for lengths in ((200,), (165, 165, 165)):
        batch = PrefillBatch.build(range(len(lengths)), lengths, [0] * len(lengths), "cuda")
        run_attention(ops, [batch], heads, head_dim, dtype, max_len=256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [(128,), (128, 1, 15, 16, 17, 127, 0, 100), (5, 33, 64, 0, 90, 80) * 22], ids=len)
def test_prefill_of_short_prompts(
    ops,
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """In one kernel, also where a thread block takes several heads. The last of several is padding: stored nowhere."""
    monkeypatch.setattr(prefill_attention, "attend", None)
    batch = PrefillBatch.build(range(len(lengths)), lengths, [0] * len(lengths), "cuda")
    num_padding = lengths[-1] if len(lengths) > 1 else 0
    batch.positions[len(batch.positions) - num_padding :] = -1
    run_attention(ops, [batch], heads, head_dim, dtype, 128, num_padding)


@pytest.mark.parametrize("head_dim", (64, 128))
def test_padding_beyond_the_last_position(ops, head_dim: int) -> None:
    """As in a captured call, which is larger than its only prompt, and perhaps than any that the cache has room for."""
    batch = PrefillBatch.build([0], [128], [0], "cuda")
    batch.positions[100:] = -1
    run_attention(ops, [batch], (8, 2), head_dim, torch.bfloat16, max_len=100, num_padding=28)


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_in_chunks(ops, heads: tuple[int, int], head_dim: int) -> None:
    """Prompts continue behind what is cached: together, alone, and beside prompts that only begin."""
    batches = [
        PrefillBatch.build([2, 0], [100, 65], [0, 0], "cuda"),
        PrefillBatch.build([2, 0], [64, 1], [100, 65], "cuda"),
        PrefillBatch.build([1, 0, 2], [37, 64, 5], [0, 66, 164], "cuda"),
        PrefillBatch.build([0, 1, 2], [33, 33, 33], [130, 37, 169], "cuda"),
    ]
    run_attention(ops, batches, heads, head_dim, torch.bfloat16, max_len=256)


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("heads", HEADS)
def test_decode_after_prefill(ops, heads: tuple[int, int], head_dim: int) -> None:
    lengths = [1, 63, 64, 130]
    batches: list = [PrefillBatch.build([3, 1, 0, 2], lengths, [0] * 4, "cuda")]
    slots = torch.tensor([3, 1, 0, 2, 1], dtype=torch.int32, device="cuda")
    for step in range(3):
        positions = torch.tensor([n + step for n in lengths] + [-1], dtype=torch.int32, device="cuda")
        batches.append(DecodeBatch(slots, positions, 192))
    run_attention(ops, batches, heads, head_dim, torch.bfloat16, max_len=192)


def test_ops_replay_in_a_graph(ops) -> None:
    """A decode layer captured once gives the same bits as the ops called one by one, also with other contents."""
    config, dtype, num_rows = shape_config("1b"), torch.bfloat16, 16
    hidden, intermediate = config.hidden_size, config.intermediate_size
    qkv, o = (normal(n, hidden, dtype=dtype, scale=hidden**-0.5) for n in (config.qkv_size, hidden))
    gate_up = normal(2 * intermediate, hidden, dtype=dtype, scale=hidden**-0.5)
    down = normal(hidden, intermediate, dtype=dtype, scale=intermediate**-0.5)
    cache, rope = poisoned_cache(num_rows, 128, config.num_kv_heads, config.head_dim, dtype), rope_table(64, 128)
    slots = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    batch = DecodeBatch(slots, torch.zeros_like(slots), 128)

    def layer(x: torch.Tensor) -> torch.Tensor:
        attn = ops.rope_append_attend(ops.norm_linear(x, None, qkv, EPS), rope, cache, batch)
        x, squares = ops.linear_add_squares(attn, o, x)
        return ops.linear_add(ops.norm_swiglu(x, None, gate_up, EPS, squares), down, x)

    torch.utils.deterministic.fill_uninitialized_memory = False
    x = normal(num_rows, hidden, dtype=dtype)
    expected = layer(layer(x))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(layer(x))
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, expected)
        x.copy_(normal(num_rows, hidden, dtype=dtype))
        expected = layer(layer(x))
