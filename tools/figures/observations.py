"""What clocks inside the kernels and trials with parts left out have shown: times that no benchmark gives."""

from __future__ import annotations

from typing import Any

from benchmarks.text_table import markdown_table
from tools.figures.provider import Results


def sections(results: Results) -> dict[str, str]:
    """A section for every file: `decode_step.json` becomes "decode-step-observations"."""
    return {f"{name.replace('_', '-')}-observations": f"{r['device']}:\n\n{table(r)}" for name, r in results.items()}


def table(recorded: dict[str, Any]) -> str:
    return markdown_table(
        ["what", "where", "measured", "unit"],
        [[r["what"], r["shape"], measured(r["low"], r["high"]), r["unit"]] for r in recorded["rows"]],
    )


def measured(low: float, high: float | None) -> str:
    """One value, or the range in which they lay."""
    return f"{low:g}" if high is None else f"{low:g} to {high:g}"
