"""What decode attention costs in a decode step: between the products before and behind it, launches overlapping.

python -m benchmarks.attention_chain [--case 1b:64x192 --case 1b:64x192/1024 ...] [--json OUT]

A case is SHAPE:ROWSxCONTEXT, and /CAPACITY where the cache has room for more tokens than CONTEXT and one. Timed in CUDA
graphs over all layers, each with weights and a cache of its own: attention alone; the chain qkv product, attention, o
product; the same chain without attention. The chains' difference is what attention costs a step.
"""

import argparse
import re
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe
from benchmarks.graph_timing import Call, capture, replay_seconds
from benchmarks.json_file import write_json
from benchmarks.layer import cuda_ops
from benchmarks.text_table import markdown_table, number
from llama3.errors import UserError
from llama3.forward_batch import DecodeBatch
from llama3.kv_cache import KVCache
from llama3.ops import gemm_search
from llama3.rope import RopeTable
from llama3.shapes import shape_config

DTYPE = torch.bfloat16
CASES = ("1b:16x128", "1b:64x192", "1b:64x192/1024", "1b:256x192", "8b:64x192")
MAX_LAYERS = 16
REPETITIONS = 15


@dataclass(frozen=True)
class Case:
    shape: str
    rows: int
    context: int
    capacity: int

    @classmethod
    def of(cls, text: str) -> "Case":
        found = re.fullmatch(r"(\w+):(\d+)x(\d+)(?:/(\d+))?", text)
        if found is None:
            raise UserError(f"{text!r} is not a case; expected SHAPE:ROWSxCONTEXT or SHAPE:ROWSxCONTEXT/CAPACITY")
        rows, context = int(found[2]), int(found[3])
        return cls(found[1], rows, context, int(found[4] or context + 1))

    @property
    def label(self) -> str:
        return f"{self.shape}: {self.rows} x {self.context} in {self.capacity}"


class Chain:
    """The layers of one case with random weights and caches, as calls to time."""

    def __init__(self, case: Case) -> None:
        config = shape_config(case.shape, min(shape_config(case.shape).num_layers, MAX_LAYERS))
        self.ops, self.config = cuda_ops(config), config
        device = torch.device("cuda", torch.cuda.current_device())
        gemm_search.expect_decode(case.rows)
        self.cache = KVCache(config, case.rows, case.capacity, DTYPE, device)
        self.cache.k.normal_()
        self.cache.v.normal_()
        self.rope = RopeTable.build(config, case.capacity, device)
        rows = torch.arange(case.rows, dtype=torch.int32, device=device)
        self.batch = DecodeBatch(rows, torch.full_like(rows, case.context), case.context + 1)
        self.qkv_weights, self.o_weights = (
            [torch.randn(size, device=device).mul_(size[1] ** -0.5).to(DTYPE) for _ in range(config.num_layers)]
            for size in ((config.qkv_size, config.hidden_size), (config.hidden_size, config.q_size))
        )
        self.x = torch.randn(case.rows, config.hidden_size, device=device).to(DTYPE)
        self.packed = torch.randn(case.rows, config.qkv_size, device=device).to(DTYPE)
        self.attended = torch.randn(case.rows, config.q_size, device=device).to(DTYPE)

    @property
    def kv_bytes(self) -> int:
        """Of one layer's attention."""
        return 2 * self.config.kv_size * int(self.batch.positions.sum()) * DTYPE.itemsize

    def attend(self, layer: int, packed: torch.Tensor) -> torch.Tensor:
        return self.ops.rope_append_attend(packed, self.rope, self.cache.layer(layer), self.batch)

    def run_layer(self, layer: int, *, attend: bool) -> None:
        packed = self.ops.norm_linear(self.x, None, self.qkv_weights[layer], self.config.rms_norm_eps)
        attended = self.attend(layer, packed) if attend else self.attended
        self.ops.linear_add(attended, self.o_weights[layer], self.x)

    def calls(self) -> dict[str, list[Call]]:
        """By name, the calls that are timed together: one a layer."""
        layers = range(self.config.num_layers)
        return {
            "attention": [partial(self.attend, layer, self.packed) for layer in layers],
            "chain": [partial(self.run_layer, layer, attend=True) for layer in layers],
            "chain_without": [partial(self.run_layer, layer, attend=False) for layer in layers],
        }


def time_together(calls: dict[str, list[Call]]) -> dict[str, float]:
    """Microseconds a layer of each, the median over replays in which they take turns."""
    graphs = {name: capture(list_of_calls) for name, list_of_calls in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repetition in range(REPETITIONS + 2):
        for name, graph in graphs.items():
            seconds = replay_seconds(graph)
            if repetition >= 2:
                times[name].append(seconds * 1e6 / len(calls[name]))
    for graph in graphs.values():
        graph.reset()
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case: Case) -> dict[str, Any]:
    chain = Chain(case)
    us = time_together(chain.calls())
    return vars(case) | {"kv_bytes": chain.kv_bytes, "us": us, "us_in_chain": us["chain"] - us["chain_without"]}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [Case(r["shape"], r["rows"], r["context"], r["capacity"]).label, number(r["kv_bytes"] / 1e6, 1)]
        + [number(us, 2) for us in (r["us"]["attention"], r["us"]["chain"], r["us"]["chain_without"], r["us_in_chain"])]
        for r in rows
    ]
    return markdown_table(("case", "KV MB", "alone us", "chain us", "without us", "in the chain us"), lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help=f"may be given several times; default: {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    try:
        rows = [measure(Case.of(text)) for text in args.case or CASES]
        if args.json is not None:
            write_json(describe() | {"dtype": "bfloat16", "rows": rows}, args.json)
    except (UserError, OSError) as error:
        print(f"benchmarks.attention_chain: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
