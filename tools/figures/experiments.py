"""Changes that were measured one at a time during development, kept or not."""

from __future__ import annotations

from typing import Any

from benchmarks.text_table import markdown_table
from tools.figures.provider import Results, sections_by_file


def sections(results: Results) -> dict[str, str]:
    return sections_by_file(results, "experiments", table)


def table(recorded: dict[str, Any]) -> str:
    lines = [
        [r["change"], r["shape"], f"{r['before_us']:.2f}", f"{r['after_us']:.2f}", "yes" if r["kept"] else "no"]
        for r in recorded["rows"]
    ]
    return markdown_table(["change", "shape", "before (µs)", "after (µs)", "kept"], lines)
