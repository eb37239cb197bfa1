"""What each stage of the work on whole-model speed was expected to do, and what it did; what power leaves of it."""

from __future__ import annotations

from benchmarks.sustained import table
from benchmarks.text_table import markdown_table
from tools.figures.provider import Results


def sections(results: Results) -> dict[str, str]:
    keys = ("floor", "before", "predicted", "after")
    lines = [
        [row["stage"], row["figure"], *("–" if row[key] is None else f"{row[key]:g}" for key in keys)]
        for row in results["stages"]["rows"]
    ]
    return {"performance-stages": markdown_table(["stage", "figure", *keys], lines)}


def sustained(results: Results) -> dict[str, str]:
    """A table a GPU, by `benchmarks/sustained.py`."""
    tables = [f"{r['device']}, power limit {r['power_limit']}:\n\n{table(r)}" for r in results.values()]
    return {"performance-sustained": "\n\n".join(tables)}
