"""The persistent decode step while it was developed, by `benchmarks/decode_step.py` and builds for experiments."""

from __future__ import annotations

from typing import Any

from benchmarks.text_table import markdown_table
from tools.figures.provider import Results

MIN_STEPS_PER_LAUNCH = 8


def sections(results: Results) -> dict[str, str]:
    return {"decode-step-revisions": revisions(results["development"])}


def revisions(record: dict[str, Any]) -> str:
    """The fastest setting of every revision at every shape and context; builds of experiments do not count."""
    fastest: dict[tuple[str, int, str], float] = {}
    for row in record["rows"]:
        if row["steps_per_launch"] >= MIN_STEPS_PER_LAUNCH and not row["build"]:
            key = row["shape"], row["context_len"], row["revision"]
            fastest[key] = min(row["us_per_token"], fastest.get(key, row["us_per_token"]))
    lines = [
        [shape.upper(), str(context), revision, f"{us:.1f}", f"{1e6 / us:.0f}"]
        for (shape, context, revision), us in sorted(fastest.items())
    ]
    return markdown_table(["shape", "context from", "revision", "µs a token", "tok/s"], lines)
