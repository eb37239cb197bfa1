"""The products of a prefill: our kernel beside cuBLASLt, each with what a layer needs around it, taking turns.

python -m benchmarks.large_products [--shape 1b,8b] [--json OUT]

The norm before a product counts for both; SwiGLU is fused in ours and a kernel of its own after cuBLASLt's product. For
as many tokens as a decode step may have, ours has the plan that turns out to be the fastest.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe
from benchmarks.graph_timing import microseconds
from benchmarks.json_file import write_json
from benchmarks.layer import product_shapes
from benchmarks.text_table import markdown_table
from llama3.config import ModelConfig
from llama3.ops import elementwise, gemm, gemm_search, linear
from llama3.ops.gemm import Plan
from llama3.shapes import shape_config

COUNTS = (256, 1024, 2048, 4096, 8192, 16384)
NUM_LAYERS = 4  # whose weights are used in turn
ROUNDS = 3
EPILOGUES = {"qkv": gemm.PLAIN, "o": gemm.RESIDUAL, "gate-up": gemm.SWIGLU, "down": gemm.RESIDUAL}
Call = Callable[[int], torch.Tensor]
PlannedCall = Callable[[Plan | None, int], torch.Tensor]


def calls(config: ModelConfig, num_tokens: int) -> dict[str, tuple[int, Call, PlannedCall]]:
    """Of each product of a layer: its FLOPs, cuBLASLt's way and ours, as functions of the layer, ours of a plan too."""
    hidden, eps = config.hidden_size, config.rms_norm_eps

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x, attn, mid = (normal(num_tokens, n) for n in (hidden, config.q_size, config.intermediate_size))
    norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    sizes = product_shapes(config)
    weights = {name: [normal(*size) * size[1] ** -0.5 for _ in range(NUM_LAYERS)] for name, size in sizes.items()}

    def normed() -> torch.Tensor:
        return elementwise.rms_norm(x, norm, eps)

    library = partial(linear.product, allow_own=False)
    ways: dict[str, tuple[Call, PlannedCall]] = {
        "qkv": (
            lambda i: library(normed(), weights["qkv"][i]),
            lambda plan, i: gemm.product(normed(), weights["qkv"][i], plan=plan),
        ),
        "o": (
            lambda i: library(attn, weights["o"][i], x),
            lambda plan, i: gemm.product(attn, weights["o"][i], x, plan=plan),
        ),
        "gate-up": (
            lambda i: elementwise.silu_mul(library(normed(), weights["gate-up"][i])),
            lambda plan, i: gemm.swiglu(normed(), weights["gate-up"][i], plan),
        ),
        "down": (
            lambda i: library(mid, weights["down"][i], x),
            lambda plan, i: gemm.product(mid, weights["down"][i], x, plan=plan),
        ),
    }
    flops = {name: 2 * num_tokens * rows * size for name, (rows, size) in sizes.items()}
    return {name: (flops[name], *both) for name, both in ways.items()}


def plans(name: str, config: ModelConfig, num_tokens: int) -> list[Plan | None]:
    """Of our kernel for a product; None is what it chooses without a measurement."""
    if num_tokens > gemm_search.MAX_TOKENS:
        return [None]
    if EPILOGUES[name] == gemm.SWIGLU:
        return [*gemm.plans_for_tokens(gemm.SWIGLU, torch.bfloat16, num_tokens)]
    clusters = gemm.clusters_at_once(torch.device("cuda", torch.cuda.current_device()))
    sizes = num_tokens, *product_shapes(config)[name]
    return [None, *gemm.promising(EPILOGUES[name], torch.bfloat16, *sizes, clusters)]


@torch.inference_mode()
def measure(shape: str, num_tokens: int) -> list[dict[str, Any]]:
    rows, config = [], shape_config(shape)
    for name, (flops, library, ours) in calls(config, num_tokens).items():
        choices = plans(name, config, num_tokens)
        ways: dict[Plan | str | None, Call] = {"cublaslt": library}
        ways.update({plan: partial(ours, plan) for plan in choices})
        times: dict[Plan | str | None, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, call in ways.items():
                times[way] += microseconds([partial(call, i) for i in range(NUM_LAYERS)], 3)
        medians = {way: statistics.median(found) for way, found in times.items()}
        by_plan = {"x".join(map(str, plan)): medians[plan] for plan in choices if plan}
        row = {"model": shape, "tokens": num_tokens, "product": name, "flops": flops, "ours_by_plan_us": by_plan}
        best = min(medians[plan] for plan in choices)
        rows.append({**row, "cublaslt_us": medians["cublaslt"], "ours_us": best})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b,8b")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows = [row for shape in args.shape.split(",") for count in COUNTS for row in measure(shape, count)]
    print(table(rows))
    if args.json:
        write_json(describe() | {"rows": rows}, args.json)


def table(rows: list[dict[str, Any]]) -> str:
    """A line a product, a column a number of tokens: microseconds, cuBLASLt's before ours."""
    counts = sorted({row["tokens"] for row in rows})
    cells = {
        (f"{row['model'].upper()} {row['product']}", row["tokens"]): f"{row['cublaslt_us']:.0f} / {row['ours_us']:.0f}"
        for row in rows
    }
    labels = dict.fromkeys(label for label, _ in cells)
    lines = [[label, *(cells.get((label, count), "") for count in counts)] for label in labels]
    return markdown_table(["µs, cuBLASLt / ours", *(f"{count} tokens" for count in counts)], lines)


if __name__ == "__main__":
    main()
