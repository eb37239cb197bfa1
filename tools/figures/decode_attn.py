"""Decode attention: the suite beside its peers, the ladder, what was tried, the check against ncu, and the plot."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.text_table import markdown_table
from tools import plot_bandwidth
from tools.figures import experiments
from tools.figures.provider import Plot, Results

PEERS = {"fa2": "FA2", "fa3": "FA3", "flashinfer": "FlashInfer"}
LADDER_STEPS = {
    "naive": "one block a query head; every byte is read once for each head of the group",
    "split": "the context is cut into parts, a second kernel combines them",
    "tensor_core": "the group shares each tile, staged in shared memory, on tensor cores",
    "ring": "even ranges of tiles for a fixed grid; a loading warp runs ahead with cp.async; merged in the same launch",
    "tma": "the copy engine loads whole tiles, so that one thread keeps the ring full",
}


def sections(results: Results) -> dict[str, str]:
    return {
        "decode-attention-summary": summary(results["suite"]),
        "decode-attention-suite": suite(results["suite"]),
        "decode-attention-ladder": ladder(results["ladder"]),
        "decode-attention-experiments": experiments.table(results["experiments"]),
        "decode-attention-ncu": ncu(results["ncu"], results["suite"]),
        "decode-attention-chain": chain(results["attention_chain"]),
        "decode-attention-sanitizer": sanitizer(results["sanitizer"]),
    }


def plots(results: Results) -> dict[str, Plot]:
    data = plot_bandwidth.plot_data(results["suite"])
    return {"decode-attention-bandwidth.png": Plot(data, plot_bandwidth.draw)}


def summary(measured: dict[str, Any]) -> str:
    ratios = [_best_peer(row) / row["us"]["ours"] for row in measured["rows"]]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    versions = measured["environment"]["versions"]
    return (
        f"{measured['environment']['gpu']}, CUDA {versions['cuda']}, torch {versions['torch']}, "
        f"vLLM {versions['vllm']} (FA3), FlashInfer {versions['flashinfer']}. Over the {len(ratios)} rows the best "
        f"peer takes {mean:.2f} times as long in the geometric mean, {min(ratios):.2f} at least, {max(ratios):.2f} at "
        f"most."
    )


def suite(measured: dict[str, Any]) -> str:
    """Microseconds of every kernel on every shape, and the bandwidth that ours reaches."""
    lines = []
    for row in measured["rows"]:
        us = row["us"]
        peers = [f"{us[name]:.1f}" if name in us else "–" for name in PEERS]
        paged = f"{us['ours, block table']:.2f}" if "ours, block table" in us else "–"
        lines.append(
            [
                *(row["label"], f"{row['kv_MB']:.1f}", f"{row['floor_us']:.2f}", f"**{us['ours']:.2f}**"),
                *(f"{us['ours, launched alone']:.2f}", paged),
                *(f"{us['ours, fused']:.2f}", *peers, f"{_best_peer(row) / us['ours']:.2f}"),
                *(f"{row['kv_MB'] / us['ours']:.2f}", f"{row['fraction_of_ceiling']:.0%}"),
            ]
        )
    head = ["q/kv heads, head size: batch x context", "KV MB", "floor", "ours", "alone", "block table", "fused"]
    return markdown_table([*head, *PEERS.values(), "best peer / ours", "TB/s", "of the ceiling"], lines)


def ladder(measured: dict[str, Any]) -> str:
    rows = measured["rows"]
    lines = [
        [f"`{version}`", step, *[f"{row['us'][version]:.1f}" for row in rows]] for version, step in LADDER_STEPS.items()
    ]
    return markdown_table(["version", "what changed", *[f"{row['label']} (µs)" for row in rows]], lines)


def ncu(counted: dict[str, Any], measured: dict[str, Any]) -> str:
    """ncu's durations beside the suite's of kernels launched alone, as they are under ncu, shape by shape."""
    by_events = {row["label"]: row["us"]["ours, launched alone"] for row in measured["rows"]}
    lines = []
    for row in counted["rows"]:
        events, rate = by_events[row["label"]], row["dram_MB"] / row["us"]
        lines.append(
            [
                *(row["label"], f"{events:.2f}", f"{row['us']:.2f}", f"{row['us'] / events - 1:+.1%}", f"{rate:.2f}"),
                f"{row['percent_of_dram_peak']:.1f} %",
            ]
        )
    return markdown_table(["shape", "graph (µs)", "ncu (µs)", "difference", "DRAM TB/s", "of the DRAM peak"], lines)


def chain(measured: dict[str, Any]) -> str:
    """What a layer's attention takes alone, and what it adds between the products before and after it."""
    lines = [
        [
            *(f"{r['shape'].upper()}: {r['rows']} x {r['context']}", f"{r['kv_bytes'] / 1e6:.1f}"),
            *(f"{r['us']['attention']:.2f}", f"{r['us_in_chain']:.2f}"),
        ]
        for r in measured["rows"]
    ]
    return f"{measured['device']}:\n\n" + markdown_table(["shape", "KV MB", "alone (µs)", "in the chain (µs)"], lines)


def sanitizer(found: dict[str, Any]) -> str:
    """A line a tool: which parts of the matrix it watched, and the worst that it said."""
    lines = []
    for tool in dict.fromkeys(run["tool"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["tool"] == tool]
        parts = ", ".join(f"{run['version']} {run['head_dim']}" for run in runs)
        failed = [run for run in runs if run["exit_code"]]
        lines.append([tool, parts, failed[0]["said"][-1] if failed else runs[-1]["said"][-1]])
    return f"{found['gpu']}:\n\n" + markdown_table(["tool", "versions and head sizes", "said"], lines)


def _best_peer(row: dict[str, Any]) -> float:
    return min(row["us"][name] for name in PEERS if name in row["us"])
