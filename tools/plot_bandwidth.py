"""A plot of decode attention's bandwidth against context at batch 1, one line a kernel, beside the read ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.plot_file import new_figure, save

NAMES = {"ours": "this kernel", "fa2": "FA2 (PyTorch)", "fa3": "FA3 (vLLM)", "flashinfer": "FlashInfer"}


def plot_data(suite: dict[str, Any]) -> dict[str, Any]:
    """Everything that the plot shows, from the results of `benchmark_kernel.py --suite`: a panel a head size.

    Points are (tokens, TB/s of KV bytes), of 32 query and 8 kv heads.
    """
    panels = []
    for head_dim in (64, 128):
        rows = [r for r in suite["rows"] if (r["num_heads"], r["head_dim"], r["batch"]) == (32, head_dim, 1)]
        lines = {
            name: [(r["context"], round(r["kv_MB"] / r["us"][name], 4)) for r in rows if name in r["us"]]
            for name in NAMES
        }
        panels.append({"title": f"head_dim {head_dim}, batch 1, 32/8 heads", "lines": lines})
    return {"panels": panels, "ceiling": suite["read_ceiling_TBs"]}


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the plot as a PNG. Raises RequestError where matplotlib is not installed."""
    figure = new_figure(10, 4)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, panel in zip(axes, data["panels"], strict=True):
        for name, points in panel["lines"].items():
            if points:
                width = 2.5 if name == "ours" else 1.2
                axis.plot(*zip(*points, strict=True), marker="o", label=NAMES[name], linewidth=width)
        axis.axhline(data["ceiling"], color="black", linestyle="--", linewidth=1, label="read ceiling")
        axis.set(title=panel["title"], xlabel="context (tokens)")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KV bytes / time (TB/s)")
    axes[0].legend()
    save(figure, data, path)
