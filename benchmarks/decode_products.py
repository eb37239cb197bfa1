"""A whole decode step with one kernel a product and without.

    python -m benchmarks.decode_products --shape 1b,3b,8b --json results/decode_products/h200.json

One CUDA graph of a step without sampling, over random weights in the real shapes, so that every weight comes from
memory. Products timed by themselves mislead: what counts is how they follow one another. The floor is the bytes of
weights and cache over the memory's read rate, measured in the same run.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.environment import describe
from benchmarks.graph_timing import median_microseconds
from benchmarks.json_file import write_json
from benchmarks.layer import cuda_ops
from benchmarks.peaks import measure_read
from llama3.device import resolve_device
from llama3.errors import UserError
from llama3.forward_batch import DecodeBatch
from llama3.kv_cache import KVCache
from llama3.model import Transformer
from llama3.ops import gemm_search, linear
from llama3.rope import RopeTable
from llama3.shapes import shape_config
from llama3.weights import random_weights

REPEATS = 9
READ_BYTES = 8 << 30


class Step:
    """One model with random weights and a random cache."""

    def __init__(self, shape: str) -> None:
        self.config = shape_config(shape)
        self.ops = cuda_ops(self.config)
        self.weights = random_weights(self.config, torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
        self.weights.fold_norms()

    def cached(self, num_tokens: int, context: int) -> tuple[KVCache, DecodeBatch, RopeTable]:
        """A random cache of `context` tokens a row, the batch of the next tokens, and rotations for all of them."""
        cache = KVCache(self.config, num_tokens, context + 1, torch.bfloat16, "cuda")
        for tensor in (cache.k, cache.v):
            tensor.normal_()
        slots = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
        batch = DecodeBatch(slots, torch.full_like(slots, context), context + 1)
        gemm_search.expect_decode(num_tokens)
        return cache, batch, RopeTable.build(self.config, context + 1, "cuda")

    def decode(self, num_tokens: int, context: int) -> Callable[[], torch.Tensor]:
        """One step over a cache of `context` tokens a row, without sampling."""
        return self.decode_over(*self.cached(num_tokens, context))

    def decode_over(self, cache: KVCache, batch: DecodeBatch, rope: RopeTable) -> Callable[[], torch.Tensor]:
        """The same over what `cached` has made."""
        model = Transformer(self.config, self.weights, self.ops, rope)
        ids = torch.arange(batch.slots.numel(), device="cuda")
        return lambda: model.decode_step(ids, batch, cache)

    def time(self, num_tokens: int, context: int) -> dict[str, float]:
        """Medians in microseconds: with one kernel a product, and with cuBLASLt before and after that."""
        decode = self.decode(num_tokens, context)

        def measure(one_kernel: bool) -> float:
            families = linear.ONE_KERNEL if one_kernel else ()
            with mock.patch.object(linear, "ONE_KERNEL", families):
                return median_microseconds([decode], REPEATS)

        before, ours, after = measure(False), measure(True), measure(False)
        moved = self.config.decode_weight_bytes() + num_tokens * context * self.config.kv_bytes_per_token()
        return {"ours_us": ours, "cublaslt_us": before, "cublaslt_again_us": after, "moved_bytes": moved}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(shapes: list[str], contexts: list[int], token_counts: list[int]) -> dict[str, Any]:
    bandwidth = measure_read(resolve_device("cuda"), READ_BYTES)
    rows = []
    for shape in shapes:
        step = Step(shape)
        for context in contexts:
            for num_tokens in token_counts:
                times = step.time(num_tokens, context)
                times["floor_us"] = times.pop("moved_bytes") / bandwidth * 1e6
                rows.append({"shape": shape, "tokens": num_tokens, "context_len": context, **times})
                figures = ", ".join(f"{name} {value:.0f}" for name, value in times.items())
                print(f"{shape} {num_tokens:3} tokens, context {context}: {figures}", flush=True)
        del step
        torch.cuda.empty_cache()
    return describe() | {"read_bandwidth": bandwidth, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--tokens", type=numbers, default=[2, 4, 8, 16, 24, 32, 48, 64, 96, 128])
    parser.add_argument("--contexts", type=numbers, default=[128, 2048])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        results = run(args.shape.split(","), args.contexts, args.tokens)
    except UserError as error:
        print(f"benchmarks.decode_products: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        write_json(results, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
