"""A model under sustained load: decode steps, their ops by themselves and prompts, for seconds, with the clock and the
power meanwhile.

    python -m benchmarks.sustained --shape 8b --cases 64x128,256x192 --json results/sustained/h200.json

A case is ROWSxCONTEXT: a decode step of so many rows, or so many prompts of that length. The median of a few replays
flatters: a GPU runs at its highest clock until its power limit lowers it, and then what an op costs is energy as much
as time. Random weights in the real shapes; without sampling.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.decode_products import REPEATS, Step
from benchmarks.environment import describe, query_command, query_gpu
from benchmarks.graph_timing import capture, replays_microseconds
from benchmarks.json_file import write_json
from benchmarks.text_table import markdown_table, number
from llama3.errors import UserError
from llama3.forward_batch import PrefillBatch
from llama3.model import Transformer

FIELDS = ("clocks.sm", "power.draw.instant")
PERIOD_MS = 100
REPLAYS = 20  # between looks at the clock on the wall, fewer if they would take longer than
BETWEEN_US = 200_000


class Sample(NamedTuple):
    """When, in seconds of time.monotonic(), the clock in MHz, and the power in watts."""

    time: float
    clock: float
    watts: float


def parse_sample(line: str, now: float) -> Sample | None:
    """A line of nvidia-smi; None where the GPU does not say."""
    try:
        clock, watts = (float(value.strip().partition(" ")[0]) for value in line.split(","))
    except ValueError:
        return None
    return Sample(now, clock, watts)


class GpuLog:
    """Clock and power of the first visible GPU while inside; nothing where nvidia-smi cannot be run."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def __enter__(self) -> "GpuLog":
        command = query_command(*FIELDS)
        self._process = None
        if command is not None:
            self._process = subprocess.Popen([*command, f"-lms={PERIOD_MS}"], stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            if sample := parse_sample(line, time.monotonic()):
                self.samples.append(sample)

    def means(self, start: float, end: float) -> dict[str, float | None]:
        """Over the samples between two times, None where there are none."""
        inside = [sample for sample in self.samples if start <= sample.time <= end]

        def mean(values: list[float]) -> float | None:
            return sum(values) / len(values) if values else None

        return {"clock_mhz": mean([s.clock for s in inside]), "watts": mean([s.watts for s in inside])}


def loads(step: Step, num_tokens: int, context: int) -> dict[str, tuple[Callable[[], object], int]]:
    """By name what is run, and how often the op in it: a step; of all layers attention, gate-up, down; prompts."""
    cached = cache, batch, rope = step.cached(num_tokens, context)
    prompts = PrefillBatch.build(range(num_tokens), [context] * num_tokens, [0] * num_tokens, "cuda")
    prompt_ids = torch.randint(step.config.vocab_size, (num_tokens * context,), device="cuda")
    config, layers, ops, eps = step.config, step.weights.layers, step.ops, step.config.rms_norm_eps

    def normal(size: int) -> torch.Tensor:
        return torch.randn(num_tokens, size, device="cuda", dtype=torch.bfloat16)

    qkv, x, mid = normal(config.qkv_size), normal(config.hidden_size), normal(config.intermediate_size)

    def attention() -> None:
        for index in range(config.num_layers):
            ops.rope_append_attend(qkv, rope, cache.layer(index), batch)

    def gate_up() -> None:
        for layer in layers:
            ops.norm_swiglu(x, layer.mlp_norm, layer.gate_up, eps)

    def down() -> None:
        for layer in layers:
            ops.linear_add(mid, layer.down, x)

    def prefill() -> None:
        Transformer(config, step.weights, ops, rope).prefill(prompt_ids, prompts, cache)

    of_layers = {"attention": attention, "gate-up": gate_up, "down": down}
    per_layer = {name: (run, config.num_layers) for name, run in of_layers.items()}
    return {"step": (step.decode_over(*cached), 1), **per_layer, "prompts": (prefill, 1)}


def measure(run: Callable[[], object], calls: int, log: GpuLog, seconds: float) -> dict[str, float | None]:
    """Microseconds of one of a run's `calls`: the median of a few replays after a rest, of long ones a single one, and
    the mean over `seconds` under load, after half as many."""
    time.sleep(0.5)
    graph = capture([run])
    (once,) = replays_microseconds(graph, 1)
    burst = once if once > BETWEEN_US else statistics.median(replays_microseconds(graph, REPEATS))
    between = max(1, min(REPLAYS, int(BETWEEN_US / burst)))

    def replay_for(duration: float) -> int:
        start, count = time.monotonic(), 0
        while time.monotonic() - start < duration:
            for _ in range(between):
                graph.replay()
            torch.cuda.synchronize()
            count += between
        return count

    replay_for(seconds / 2)
    start = time.monotonic()
    count = replay_for(seconds)
    end = time.monotonic()
    found = {"burst_us": burst / calls, "sustained_us": (end - start) * 1e6 / count / calls}
    return found | log.means(start + PERIOD_MS / 1e3, end)


def run(shape: str, cases: list[tuple[int, int]], seconds: float) -> dict[str, Any]:
    step, rows = Step(shape), []
    with GpuLog() as log:
        for num_tokens, context in cases:
            for name, (call, calls) in loads(step, num_tokens, context).items():
                row = {"shape": shape, "load": name, "tokens": num_tokens, "context": context}
                row |= measure(call, calls, log, seconds)
                rows.append(row)
                print(table({"rows": [row]}).splitlines()[-1], flush=True)
            torch.cuda.empty_cache()
    limit = query_gpu("power.limit")
    return {**describe(), "power_limit": limit[0] if limit else None, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """A line a load."""
    columns = ("load", "rows x context", "µs, a few replays", "µs, for seconds", "clock (MHz)", "power (W)")
    lines = []
    for row in results["rows"]:
        digits = int(row["sustained_us"] < 1000)
        cells = [number(row[key], digits) for key in ("burst_us", "sustained_us")]
        cells += [number(row[key], 0) for key in ("clock_mhz", "watts")]
        lines.append([f"{row['shape'].upper()} {row['load']}", f"{row['tokens']} x {row['context']}", *cells])
    return markdown_table(columns, lines)


def cases(text: str) -> list[tuple[int, int]]:
    pairs = (part.split("x") for part in text.split(","))
    return [(int(rows), int(context)) for rows, context in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--cases", type=cases, default="64x128,256x192", help="by comma, ROWSxCONTEXT")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    try:
        results = run(options.shape, options.cases, options.seconds)
    except UserError as error:
        print(f"benchmarks.sustained: {error}", file=sys.stderr)
        return 2
    if options.json:
        write_json(results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
