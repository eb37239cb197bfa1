"""How fast each op of the seam runs on this GPU, against its floor.

python -m benchmarks.ops [--shape 1b,8b] [--tokens 16,64,256,16384] [--json OUT]     measure, print a table
python -m benchmarks.ops --table RESULTS.json                                        print the table of an earlier run

Each op is called in a CUDA graph with another layer's weights every time, so that they come from memory as in a model;
the floor is the larger of weights and activations over the read bandwidth, and operations over the matrix peak.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe
from benchmarks.graph_timing import median_microseconds
from benchmarks.json_file import write_json
from benchmarks.layer import cuda_ops, product_shapes
from benchmarks.peaks import KNOWN
from benchmarks.text_table import markdown_table, number
from llama3.config import ModelConfig
from llama3.errors import UserError
from llama3.forward_batch import PrefillBatch
from llama3.kv_cache import KVCache
from llama3.ops import gemm_search
from llama3.ops.cuda import CudaOps
from llama3.rope import RopeTable
from llama3.shapes import shape_config

DTYPE = torch.bfloat16
ROTATED_BYTES = 600 << 20  # of weights, more than three times an L2
MAX_LAYERS = 16
REPETITIONS = 7
MAX_DECODE_TOKENS = 1024  # more are taken for a prefill, of prompts this long:
PROMPT_LENS = (2048, 128)
Row = dict[str, Any]


def measure(run: Callable[[int], object], calls: int) -> float:
    """Median microseconds of one of run(0) ... run(calls - 1), from replays of a graph of them all."""
    return median_microseconds([partial(run, i) for i in range(calls)], REPETITIONS)


def measure_products(ops: CudaOps, config: ModelConfig, num_tokens: int) -> list[Row]:
    """The four projections of a layer and, in decode, the head: each with what the seam fuses with it."""
    hidden, eps = config.hidden_size, config.rms_norm_eps
    shapes = product_shapes(config) | {"head": (config.vocab_size, hidden)}
    rows = []
    for name, (num_rows, size) in shapes.items():
        adds_residual = name in ("o", "down")
        if name == "head" and num_tokens > MAX_DECODE_TOKENS:
            continue  # a prefill needs the head for last tokens only
        count = min(max(2, ROTATED_BYTES // (num_rows * size * DTYPE.itemsize) + 1), MAX_LAYERS)
        weights = [torch.randn(num_rows, size, device="cuda").mul_(size**-0.5).to(DTYPE) for _ in range(count)]
        x = torch.randn(num_tokens, size, device="cuda").to(DTYPE)
        residual = torch.randn(num_tokens, hidden, device="cuda").to(DTYPE)

        def run(i: int, name=name, adds=adds_residual, x=x, weights=weights, residual=residual) -> torch.Tensor:
            weight = weights[i % len(weights)]
            if adds:
                return ops.linear_add(x, weight, residual)
            return (ops.norm_swiglu if name == "gate-up" else ops.norm_linear)(x, None, weight, eps)

        us = measure(run, 2 * count if num_tokens <= MAX_DECODE_TOKENS else 3)
        out = num_rows // 2 if name == "gate-up" else num_rows
        moved = (num_rows * size + num_tokens * (size + out + adds_residual * hidden)) * DTYPE.itemsize
        rows.append(
            {"op": name, "tokens": num_tokens, "us": us, "bytes": moved, "flops": 2 * num_tokens * num_rows * size}
        )
    return rows


def measure_prefill_attention(ops: CudaOps, config: ModelConfig, num_tokens: int, prompt_len: int) -> Row:
    """Rotation, appending and attention of prompts of `prompt_len` tokens."""
    num_seqs = num_tokens // prompt_len
    cache = KVCache(config, num_seqs, prompt_len, DTYPE, "cuda").layer(0)
    rope = RopeTable.build(config, prompt_len, "cuda")
    batch = PrefillBatch.build(range(num_seqs), [prompt_len] * num_seqs, [0] * num_seqs, "cuda")
    qkv = torch.randn(num_seqs * prompt_len, config.qkv_size, device="cuda").to(DTYPE)
    us = measure(lambda i: ops.rope_append_attend(qkv, rope, cache, batch), 3)
    flops = 2 * num_seqs * prompt_len**2 * config.q_size  # two products, half of each below the diagonal
    moved = num_seqs * prompt_len * (config.qkv_size + config.q_size + 2 * config.kv_size) * DTYPE.itemsize
    op = f"attention, {prompt_len} a prompt"
    return {"op": op, "tokens": num_seqs * prompt_len, "us": us, "bytes": moved, "flops": flops}


def floor_us(row: Row, results: dict[str, Any]) -> float:
    """Microseconds that a row's bytes or its operations take at the peaks of its run, whichever are more."""
    return max(row["bytes"] / results["read_bandwidth"], row["flops"] / results["matrix_flops"]) * 1e6


def table(results: dict[str, Any]) -> str:
    """The rows of a run, with floors from its peaks."""
    rows = []
    for row in results["rows"]:
        floor = floor_us(row, results)
        rates = (row["bytes"] / row["us"] / 1e3, row["flops"] / row["us"] / 1e6)
        figures = [number(row["us"], 1), number(floor, 1), f"{floor / row['us']:.0%}", *(number(r, 0) for r in rates)]
        rows.append([row["model"], row["op"], str(row["tokens"]), *figures])
    return markdown_table(("model", "op", "tokens", "us", "floor us", "of floor", "GB/s", "TFLOP/s"), rows)


def run(shapes: list[str], token_counts: list[int]) -> dict[str, Any]:
    facts = describe()
    if facts["device"] not in KNOWN:
        raise UserError(f"no peaks are known for {facts['device']}: measure them with python -m benchmarks.peaks")
    matrix_flops, read_bandwidth = KNOWN[facts["device"]]
    results = facts | {"matrix_flops": matrix_flops, "read_bandwidth": read_bandwidth, "dtype": "bfloat16", "rows": []}
    for shape in shapes:
        config = shape_config(shape)
        ops = cuda_ops(config)
        for num_tokens in token_counts:
            is_prefill = num_tokens > MAX_DECODE_TOKENS
            if not is_prefill:
                gemm_search.expect_decode(num_tokens)
            rows = measure_products(ops, config, num_tokens)
            if is_prefill:
                rows += [measure_prefill_attention(ops, config, num_tokens, length) for length in PROMPT_LENS]
            results["rows"] += [{"model": shape, **row} for row in rows]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b,8b", help="comma-separated names of model shapes")
    parser.add_argument("--tokens", default="16,64,256,16384", help="comma-separated token counts")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--table", type=Path, help="print the table of these results, and measure nothing")
    args = parser.parse_args()
    try:
        if args.table is not None:
            results = json.loads(args.table.read_text())
        else:
            results = run(args.shape.split(","), [int(n) for n in args.tokens.split(",")])
    except (UserError, OSError) as error:
        print(f"benchmarks.ops: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        write_json(results, args.json)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
