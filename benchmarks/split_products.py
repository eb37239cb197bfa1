"""The products of a decode step of many rows: our kernel in each of its tilings beside cuBLASLt, and whole steps.

    python -m benchmarks.split_products --json results/gemm/decode.json

Products follow one another in a graph over weights that rotate through more memory than the L2 holds. Then one graph of
a step without sampling over random weights in the real shapes, with cuBLASLt's products only and with what the search
picks, taking turns.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.decode_products import Step, numbers
from benchmarks.environment import describe
from benchmarks.graph_timing import microseconds
from benchmarks.text_table import markdown_table
from llama3.config import ModelConfig
from llama3.forward_batch import DecodeBatch
from llama3.kv_cache import KVCache
from llama3.model import Transformer
from llama3.ops import gemm, gemm_search
from llama3.ops.cublaslt import Product
from llama3.ops.gemm_search import Algorithm
from llama3.rope import RopeTable
from llama3.shapes import shape_config

DTYPE = torch.bfloat16
ROTATED_BYTES = 200 << 20
REPEATS = 9
Row = dict[str, Any]


def label(algorithm: Algorithm) -> str:
    return (
        f"{algorithm.rows} x {algorithm.splits} by {algorithm.shared}"
        if isinstance(algorithm, gemm.Tiling)
        else "cublaslt"
    )


@torch.inference_mode()
def measure_products(config: ModelConfig, shape: str, num_tokens: int) -> list[Row]:
    """A row a product: microseconds by label, and which one a search picks."""
    hidden, device = config.hidden_size, torch.device("cuda", torch.cuda.current_device())
    sizes = {"qkv": (config.qkv_size, hidden), "o": (hidden, config.q_size), "down": (hidden, config.intermediate_size)}
    rows = []
    for name, (num_rows, size) in sizes.items():
        count = max(4, ROTATED_BYTES // (num_rows * size * DTYPE.itemsize) + 1)
        weights = [torch.randn(num_rows, size, device=device).mul_(size**-0.5).to(DTYPE) for _ in range(count)]
        x = torch.randn(num_tokens, size, device=device).to(DTYPE)
        residual = None if name == "qkv" else torch.randn(num_tokens, num_rows, device=device).to(DTYPE)
        product = Product(num_tokens, num_rows, size, DTYPE, device)

        def call(algorithm: Algorithm, weight: torch.Tensor, x=x, residual=residual, product=product) -> None:
            out = x.new_empty(product.num_tokens, product.num_rows)
            gemm_search.run(product, algorithm, x, weight, residual, out)

        out = x.new_empty(num_tokens, num_rows)
        gemm_search.expect_decode(num_tokens)
        picked, library = (
            gemm_search.algorithm_for(product, x, weights[0], residual, out, own) for own in (True, False)
        )
        times: dict[str, list[float]] = {}
        for _ in range(2):
            for algorithm in (library, *gemm.tilings(device, num_tokens, num_rows, size)):
                found = microseconds([partial(call, algorithm, weight) for weight in weights], 3)
                times.setdefault(label(algorithm), []).extend(found)
        medians = {key: statistics.median(found) for key, found in times.items()}
        flops, moved = 2 * num_tokens * num_rows * size, 2 * (num_rows * size + num_tokens * (size + num_rows))
        row = {"model": shape, "product": name, "tokens": num_tokens, "flops": flops, "bytes": moved}
        rows.append(row | {"picked": label(picked), "us": medians})
    return rows


@torch.inference_mode()
def measure_step(step: Step, shape: str, num_tokens: int, context: int) -> Row:
    config = step.config
    model = Transformer(config, step.weights, step.ops, RopeTable.build(config, context + 1, "cuda"))
    cache = KVCache(config, num_tokens, context + 1, DTYPE, "cuda")
    for tensor in (cache.k, cache.v):
        tensor.normal_()
    slots = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
    batch, ids = (
        DecodeBatch(slots, torch.full_like(slots, context), context + 1),
        torch.arange(num_tokens, device="cuda"),
    )
    gemm_search.expect_decode(num_tokens)
    search = gemm_search.algorithm_for

    def library_only(
        product: Product,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None,
        out: torch.Tensor,
        allow_own: bool,
    ) -> Algorithm:
        return search(product, x, weight, residual, out, allow_own=False)

    ways = {"cublaslt_us": library_only, "ours_us": search}
    times: dict[str, list[float]] = {key: [] for key in ways}
    for _ in range(2):
        for key, way in ways.items():
            with mock.patch.object(gemm_search, "algorithm_for", way):
                times[key] += microseconds([lambda: model.decode_step(ids, batch, cache)], REPEATS)
    medians = {key: statistics.median(found) for key, found in times.items()}
    return {"model": shape, "tokens": num_tokens, "context_len": context, **medians}


def table(results: dict[str, Any]) -> str:
    """A line a product, a column a number of tokens: microseconds, cuBLASLt's before our best and its tiling."""
    cells = {}
    for row in results["rows"]:
        ours = {key: us for key, us in row["us"].items() if key != "cublaslt"}
        text = f"{row['us']['cublaslt']:.1f}"
        if ours:
            best = min(ours, key=lambda key: ours[key])
            text += f" / {ours[best]:.1f} ({best.replace('x', '×')})"
        cells[f"{row['model'].upper()} {row['product']}", row["tokens"]] = text
    counts, labels = sorted({count for _, count in cells}), dict.fromkeys(label for label, _ in cells)
    lines = [[label, *(cells.get((label, count), "–") for count in counts)] for label in labels]
    return markdown_table(["µs, cuBLASLt / ours", *(f"{count} tokens" for count in counts)], lines)


def step_table(results: dict[str, Any]) -> str:
    lines = [
        [
            row["model"].upper(),
            str(row["tokens"]),
            str(row["context_len"]),
            f"{row['cublaslt_us']:.0f}",
            f"{row['ours_us']:.0f}",
        ]
        for row in results["steps"]
    ]
    return markdown_table(["step, µs", "rows", "context", "cuBLASLt", "with ours"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1b,8b")
    parser.add_argument("--tokens", type=numbers, default=[129, 192, 256, 384, 512])
    parser.add_argument("--steps", type=numbers, default=[256], help="rows of whole steps")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = describe() | {"rows": [], "steps": []}
    for shape in args.shape.split(","):
        for count in args.tokens:
            results["rows"] += measure_products(shape_config(shape), shape, count)
        step = Step(shape)
        results["steps"] += [measure_step(step, shape, count, args.context) for count in args.steps]
        del step
        torch.cuda.empty_cache()
    print(table(results), step_table(results), sep="\n\n")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
