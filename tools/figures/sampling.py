"""The sampling kernels, by `python -m benchmarks.sampling --json results/sampling/h200.json`."""

from __future__ import annotations

from typing import Any

from benchmarks.text_table import markdown_table
from tools.figures.provider import Results


def sections(results: Results) -> dict[str, str]:
    return {"sampling-times": times(results["h200"])}


def times(record: dict[str, Any]) -> str:
    """Microseconds by rules and batch size, "peaked / normal" rows with logits in L2; then the floor, and PyTorch."""
    rows = [row for row in record["results"] if not row["cold"] and not row["overlap"]]
    us = {(row["mode"], row["kind"], row["batch"]): row["us"] for row in rows}
    floors = {row["batch"]: row["floor_us"] for row in rows}
    lines = [
        [mode, *(f"{us[mode, 'peaked', batch]:.1f} / {us[mode, 'normal', batch]:.1f}" for batch in floors)]
        for mode in dict.fromkeys(row["mode"] for row in rows)
    ]
    lines.append(["reading the logits from memory once", *(f"{floor:.1f}" for floor in floors.values())])
    for mode in dict.fromkeys(row["mode"] for row in record["reference"]):
        sorting = {row["batch"]: row["us"] for row in record["reference"] if row["mode"] == mode}
        cells = [f"{sorting[batch]:.0f}" if batch in sorting else "" for batch in floors]
        lines.append([f"PyTorch reference, {mode}", *cells])
    return markdown_table(["µs a call", *(f"B = {batch}" for batch in floors)], lines)
