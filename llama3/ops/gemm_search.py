"""Which cuBLASLt algorithm runs a product: measured for the batch sizes of decode, and remembered on disk.

The library's own first choice is up to 15 % slower than its best there (docs/cuda-ops.md). Prompts come in any length,
and a search takes longer than a prefill, so for them the first choice stands.
"""

import json
import os
from pathlib import Path

import torch

from llama3.ops import cublaslt
from llama3.ops.cublaslt import Product

MAX_TOKENS = 1024  # beyond it the first choice is the best, or close
CANDIDATES = 8
REPEATS = 7
FLUSH_BYTES = 128 << 20  # more than any L2: weights come from memory in a decode step

_decode_batches: set[int] = set()
_first: dict[Product, bytes] = {}
_measured: dict[Product, bytes] = {}


def expect_decode(batch_size: int) -> None:
    """Say that decode runs this many rows: from now on its products are worth a search."""
    _decode_batches.add(batch_size)


def algorithm_for(product: Product, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> bytes:
    """The algorithm for `product`: known, or measured now on these tensors (out is overwritten, the host waits), or the
    library's first choice where a search does not pay.

    While a graph is being captured nothing can be measured, so run a step once before its capture.
    """
    if product in _measured:
        return _measured[product]
    searched = product.num_tokens in _decode_batches and product.num_tokens <= MAX_TOKENS
    if not searched or torch.cuda.is_current_stream_capturing():
        if product not in _first:
            _first[product] = product.algorithms(1)[0]
        return _first[product]
    key, known = _key(product), _read_cache()
    if key not in known:
        measured = measure(product, x, weight, out).hex()
        known = {**_read_cache(), key: measured}
        _write_cache(known)
    _measured[product] = bytes.fromhex(known[key])
    return _measured[product]


def measure(product: Product, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> bytes:
    """The fastest of the library's candidates, each timed several times with a cold L2. Waits for the GPU."""
    candidates = product.algorithms(CANDIDATES)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=product.device)
    times: dict[bytes, list[float]] = {candidate: [] for candidate in candidates}
    for _ in range(REPEATS):
        for candidate in candidates:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            product.run(x, weight, None, out, candidate)
            end.record()
            end.synchronize()
            times[candidate].append(start.elapsed_time(end))
    return min(candidates, key=lambda candidate: sorted(times[candidate])[REPEATS // 2])


def cache_path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLAMA3_KERNEL_CACHE") or Path(root) / "llama3-kernels") / "gemm-algorithms.json"


def _key(product: Product) -> str:
    name = torch.cuda.get_device_name(product.device)
    shape = f"{product.num_tokens}x{product.num_rows}x{product.size} {str(product.dtype).removeprefix('torch.')}"
    return f"{name}, cuBLASLt {cublaslt.version()}: {shape}"


def _read_cache() -> dict[str, str]:
    try:
        known = json.loads(cache_path().read_text())
    except (OSError, ValueError):  # no cache yet, or one cut short: measure again
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(known: dict[str, str]) -> None:
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(known, indent=1))
    scratch.replace(path)
