"""Time the sampling kernels: `python -m benchmarks.sampling [--json FILE]` on a GPU.

Every figure is the median of graph replays of many calls in a row, divided by their number: the launch gap that a node
of a graph costs is in it, the host is not. Logits are bf16 [B, 128256], random rows ("normal": flat, thousands of
tokens survive top-p 0.9) or rows shaped like a language model's ("peaked": dozens). "cold": the calls go round buffers
of more than 180 MB together, else they use one, which a batch of up to 64 leaves in L2, as the model's head would.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.environment import describe
from benchmarks.graph_timing import microseconds
from benchmarks.json_file import write_json
from benchmarks.peaks import H200_READ_BANDWIDTH
from llama3.ops.sampling import sample
from llama3.sampling import SamplingTensors, sample_tokens

VOCAB_SIZE = 128256
COLD_BYTES = 192 << 20
REPEATS = 15
BATCHES = (1, 4, 16, 64, 256)
MODES: dict[str, dict] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.6": {"temperature": 0.6},
    "top-p 0.9": {"temperature": 0.6, "top_p": 0.9},
    "top-k 50": {"temperature": 0.6, "top_k": 50},
    "top-k 50, top-p 0.9": {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
    "min-p 0.05": {"temperature": 0.6, "min_p": 0.05},
}


def rules(batch: int, rule: dict) -> SamplingTensors:
    params = SamplingTensors.allocate(batch, "cuda")
    params.top_p.fill_(1.0)
    for name, value in rule.items():
        getattr(params, name).fill_(value)
    params.request.copy_(torch.arange(batch))
    filters = any(name in rule for name in ("top_k", "top_p", "min_p"))
    return replace(params, all_greedy=rule["temperature"] == 0, any_filter=filters)


def rows(kind: str, batch: int) -> torch.Tensor:
    normal = torch.randn(batch, VOCAB_SIZE, device="cuda")
    if kind == "normal":
        return normal.bfloat16()
    return (normal * 2 + torch.rand(batch, VOCAB_SIZE, device="cuda") ** 400 * 20).bfloat16()


def summary(times: list[float]) -> dict[str, float]:
    return {"us": statistics.median(times), "low_us": min(times), "high_us": max(times)}


def measure(mode: str, kind: str, batch: int, cold: bool, blocks: int = 0, overlap: bool = False) -> dict:
    params = rules(batch, MODES[mode])
    num_bytes = batch * VOCAB_SIZE * 2
    buffers = [rows(kind, batch)]
    if cold:
        buffers += [buffers[0].roll(i, 0).clone() for i in range(1, -(-COLD_BYTES // num_bytes))]
    positions = torch.arange(100, 100 + batch, dtype=torch.int32, device="cuda")
    out = torch.empty(batch, dtype=torch.int64, device="cuda")
    order = [buffers[i % len(buffers)] for i in range(max(len(buffers), 64))]
    calls = [lambda b=b: sample(b, params, positions, out, blocks_per_row=blocks, overlap=overlap) for b in order]
    differing = sample(buffers[0], params, positions) != sample_tokens(buffers[0], params, positions)
    assert differing.sum() <= 1, "the kernel draws other tokens than the reference"  # one may lie within rounding
    times = microseconds(calls, REPEATS)
    floor = num_bytes / H200_READ_BANDWIDTH * 1e6
    setup = {"mode": mode, "kind": kind, "batch": batch, "cold": cold, "blocks_per_row": blocks, "overlap": overlap}
    return setup | summary(times) | {"floor_us": floor}


def reference(mode: str, batch: int) -> dict:
    """The same draw in PyTorch, which sorts."""
    params, logits = rules(batch, MODES[mode]), rows("normal", batch)
    positions = torch.arange(100, 100 + batch, dtype=torch.int32, device="cuda")
    times = microseconds([lambda: sample_tokens(logits, params, positions)] * 2, repeats=5)
    return {"mode": mode, "batch": batch} | summary(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the sampling kernels")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--sweep", action="store_true", help="also try every number of blocks a row")
    args = parser.parse_args()
    torch.manual_seed(0)
    results = []
    print(f"{'mode':22} {'rows':7} {'B':>4} {'us':>8} {'cold us':>8} {'overlap':>8} {'floor':>7}")
    for mode in MODES:
        for kind in ("normal", "peaked"):
            for batch in BATCHES:
                warm, cold = (measure(mode, kind, batch, cold) for cold in (False, True))
                chained = measure(mode, kind, batch, False, overlap=True)
                results += [warm, cold, chained]
                figures = f"{warm['us']:8.2f} {cold['us']:8.2f} {chained['us']:8.2f} {warm['floor_us']:7.2f}"
                print(f"{mode:22} {kind:7} {batch:4} {figures}", flush=True)
    sweep = []
    for mode in ("greedy", "temperature 0.6", "top-p 0.9") if args.sweep else ():
        for batch in (1, 4, 8, 16, 32, 64, 128, 256):
            line = [measure(mode, "normal", batch, False, blocks) for blocks in (1, 2, 4, 8, 16)]
            sweep += line
            figures = " ".join(f"{figure['us']:8.2f}" for figure in line)
            print(f"{mode:22} B {batch:4}, blocks 1 2 4 8 16: {figures}", flush=True)
    sorting = [reference(mode, batch) for mode in ("greedy", "top-p 0.9") for batch in (1, 64)]
    for row in sorting:
        print(f"PyTorch reference: {row['mode']:12} B {row['batch']:3} {row['us']:10.1f}")
    if args.json:
        record = {"environment": describe(), "results": results, "sweep": sweep, "reference": sorting}
        write_json(record, args.json)


if __name__ == "__main__":
    main()
