"""What clocks inside the kernels and trials with parts left out have shown: times that no benchmark gives."""

from __future__ import annotations

from typing import Any

from benchmarks.text_table import markdown_table
from tools.figures.provider import Results, sections_by_file


def sections(results: Results) -> dict[str, str]:
    return sections_by_file(results, "observations", table)


def table(recorded: dict[str, Any]) -> str:
    return markdown_table(
        ["what", "where", "measured", "unit"],
        [[r["what"], r["shape"], measured(r["low"], r["high"]), r["unit"]] for r in recorded["rows"]],
    )


def measured(low: float, high: float | None) -> str:
    """One value, or the range in which they lay."""
    return f"{low:g}" if high is None else f"{low:g} to {high:g}"
