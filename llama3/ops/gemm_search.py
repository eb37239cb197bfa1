"""What runs a product, an algorithm of cuBLASLt or a kernel of ours: measured for the batch sizes of decode, and
remembered on disk.

The library's own first choice is up to 15 % slower than its best there (docs/cuda-ops.md). Prompts come in any length,
and a search takes longer than a prefill, so for them the first choice stands.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import load_custom_kernels
from llama3.device import is_hopper
from llama3.ops import cublaslt, elementwise, gemm
from llama3.ops.cublaslt import Product
from llama3.ops.gemm import Plan

MAX_TOKENS = 1024  # beyond it the first choice is the best, or close
CANDIDATES = 8
FINALISTS = 4  # of a first, short round
FIRST_REPEATS, REPEATS = 3, 9
ROTATED_BYTES = 128 << 20  # more than any L2: weights come from memory in a decode step
MAX_COPIES = 64
MIN_RUNS = 8  # of a product in a graph
NEIGHBOUR_SIZE = 4096  # of the norm between them
OWN_VERSION = 4  # of our kernels: another one makes what was measured before obsolete
OWN, APART = "csrc/gemm", "apart"  # how they are remembered

Algorithm = bytes | Plan  # cuBLASLt's, opaque, or our kernel's
Way = Callable[[torch.Tensor], object]  # to run something with this weight

_decode_batches: set[int] = set()
_first: dict[Product, bytes] = {}
_measured: dict[tuple[Product, bool, bool], Algorithm] = {}
_fused: dict[Product, Plan | None] = {}


def expect_decode(batch_size: int) -> None:
    """Say that decode runs this many rows: from now on its products are worth a search."""
    _decode_batches.add(batch_size)


def algorithm_for(
    product: Product,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    allow_own: bool = True,
) -> Algorithm:
    """The algorithm for `product`: known, or measured now on these tensors (out is overwritten, the host waits), or the
    library's first choice where a search does not pay.

    While a graph is being captured nothing can be measured, so run a step once before its capture.
    """
    memo = product, residual is not None, allow_own
    if memo in _measured:
        return _measured[memo]
    if not _may_search(product.num_tokens):
        if product not in _first:
            _first[product] = product.algorithms(1)[0]
        return _first[product]
    key = _key(product) + (", added" if residual is not None else "") + ("" if allow_own else ", cuBLASLt only")
    algorithm = _parse(_read_cache().get(key), _epilogue(residual))
    if algorithm is None:
        algorithm = measure(product, x, weight, residual, out, allow_own)
        _write_cache({**_read_cache(), key: _name(algorithm)})
    _measured[memo] = algorithm
    return algorithm


def swiglu_plan(x: torch.Tensor, gate_up: torch.Tensor, apart: Way) -> Plan | None:
    """The plan with which gemm.swiglu is faster than `apart`, a product and SwiGLU one after the other, or None:
    measured as above, or by what is known of large batches."""
    num_tokens, num_rows, size = x.shape[0], *gate_up.shape
    if not is_hopper(x.device) or x.dtype not in gemm.DTYPES or num_rows % 16 or size % 8:
        return None
    product = Product(num_tokens, num_rows, size, x.dtype, x.device)
    if product not in _fused:
        if num_tokens <= gemm.BLOCK_TOKENS or not _may_search(num_tokens):
            if not gemm.suits(x.device, num_tokens, num_rows, size):
                return None
            clusters = gemm.clusters_at_once(x.device)
            return gemm.default_plan(gemm.SWIGLU, x.dtype, num_tokens, num_rows, size, clusters)
        _fused[product] = _fastest_swiglu(f"{_key(product)}, SwiGLU", x, gate_up, apart)
    return _fused[product]


def _fastest_swiglu(key: str, x: torch.Tensor, gate_up: torch.Tensor, apart: Way) -> Plan | None:
    def fused(plan: Plan) -> Way:
        return lambda weight: gemm.swiglu(x, weight, plan)

    plans = {_name(plan): plan for plan in gemm.plans_for_tokens(gemm.SWIGLU, x.dtype, len(x))}
    known = _read_cache().get(key, "")
    if known != APART and known not in plans:
        ways = {APART: apart} | {name: fused(plan) for name, plan in plans.items()}
        known = list(ways)[fastest(list(ways.values()), x, gate_up)]
        _write_cache({**_read_cache(), key: known})
    return plans.get(known)


def _may_search(num_tokens: int) -> bool:
    is_decode = num_tokens in _decode_batches and num_tokens <= MAX_TOKENS
    return is_decode and not torch.cuda.is_current_stream_capturing()


def run(
    product: Product,
    algorithm: Algorithm,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if isinstance(algorithm, bytes):
        product.run(x, weight, residual, out, algorithm)
    else:
        gemm.product(x, weight, residual, out, algorithm)


def measure(
    product: Product,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    allow_own: bool,
) -> Algorithm:
    """The fastest of the library's candidates and our kernels. Waits for the GPU."""
    candidates: list[Algorithm] = list(product.algorithms(CANDIDATES))
    if allow_own:
        candidates += gemm.plans_for(_epilogue(residual), x, weight)

    def way(candidate: Algorithm) -> Way:
        return lambda weight: run(product, candidate, x, weight, residual, out)

    return candidates[fastest([way(candidate) for candidate in candidates], x, weight)]


def fastest(ways: Sequence[Way], x: torch.Tensor, weight: torch.Tensor) -> int:
    """Which of them is, where each is run as in a decode step: in a graph, one after the other, between kernels that
    overlap with ours but not with the library's, with weights that are not in L2. Timed one by one instead, products of
    a few microseconds are told apart no better than by chance."""
    weights, neighbour = _copies(weight), x.new_ones(len(x), NEIGHBOUR_SIZE, dtype=torch.bfloat16)
    graphs = [_capture(way, neighbour, weights) for way in ways]
    times = [_replay_times([graph], FIRST_REPEATS)[0] for graph in graphs]
    finalists = sorted(range(len(ways)), key=lambda i: times[i])[:FINALISTS]
    final = _replay_times([graphs[i] for i in finalists], REPEATS)
    return finalists[final.index(min(final))]


def _copies(weight: torch.Tensor) -> list[torch.Tensor]:
    """Of a weight, together more than L2 holds; itself alone if it is that large."""
    count = min(-(-ROTATED_BYTES // weight.nbytes), MAX_COPIES)
    if count == 1:
        return [weight]
    elements = cublaslt.ALIGNMENT // weight.element_size()
    pool = weight.new_empty(count, -(-weight.numel() // elements) * elements)
    copies = pool[:, : weight.numel()].unflatten(1, weight.shape)
    copies.copy_(weight)
    return list(copies)


def _capture(way: Way, neighbour: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.cuda.CUDAGraph:
    def run(weight: torch.Tensor) -> None:
        elementwise.rms_norm(neighbour, None, eps=1e-5)
        way(weight)

    run(weights[0])  # what happens once is not captured
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(weights[0].device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # torch.cuda.graph would collect garbage every time
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(max(len(weights), MIN_RUNS)):
                run(weights[i % len(weights)])
        finally:  # after an interruption, too: nothing else could be captured, or waited for
            graph.capture_end()
    return graph


def _replay_times(graphs: Sequence[torch.cuda.CUDAGraph], repeats: int) -> list[float]:
    """Medians of their replays, which take turns; the first ones do not count."""
    times: list[list[float]] = [[] for _ in graphs]
    for repeat in range(repeats + 1):
        for graph, found in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat:
                found.append(start.elapsed_time(end))
    return [sorted(found)[repeats // 2] for found in times]


def cache_path() -> Path:
    return load_custom_kernels.cache_folder() / "gemm-algorithms.json"


def _key(product: Product) -> str:
    name = torch.cuda.get_device_name(product.device)
    shape = f"{product.num_tokens}x{product.num_rows}x{product.size} {str(product.dtype).removeprefix('torch.')}"
    return f"{name}, cuBLASLt {cublaslt.version()}, own {OWN_VERSION}: {shape}"


def _epilogue(residual: torch.Tensor | None) -> int:
    return gemm.PLAIN if residual is None else gemm.RESIDUAL


def _name(algorithm: Algorithm) -> str:
    return algorithm.hex() if isinstance(algorithm, bytes) else f"{OWN} {'x'.join(map(str, algorithm))}"


def _parse(name: object, epilogue: int) -> Algorithm | None:
    """What _name has named; None, and so measured anew, if it is nothing that we can run."""
    if not isinstance(name, str):
        return None
    if name.startswith(OWN):
        return next((plan for plan in gemm.PLANS[epilogue] if _name(plan) == name), None)
    try:
        algorithm = bytes.fromhex(name)
    except ValueError:
        return None
    return algorithm if len(algorithm) == cublaslt.ALGORITHM_BYTES else None


def _read_cache() -> dict[str, str]:
    try:
        known = json.loads(cache_path().read_text())
    except (OSError, ValueError):  # no cache yet, or one cut short: measure again
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(known: dict[str, str]) -> None:
    """Where nothing can be written, the next process searches again."""
    path = cache_path()
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(known, indent=1))
        scratch.replace(path)
