"""What was seen to hold on a GPU, by `tools/gpu_checks.py`: tests by file, and full-size models."""

from __future__ import annotations

from typing import Any

from benchmarks.text_table import markdown_table
from tools.figures.provider import Results


def sections(results: Results) -> dict[str, str]:
    report = results["gpu_checks"]
    return {"gpu-tests": tests(report), "full-size-models": models(report)}


def tests(report: dict[str, Any]) -> str:
    files = report["tests"]["files"]
    lines = [[f"`{name}`", *(str(n[k]) for k in ("passed", "failed", "skipped"))] for name, n in files.items()]
    where = report["environment"]
    return (
        f"{where['device']}, torch {where['torch']}, sources {report['sources']}, "
        f"{report['tests']['seconds']:.0f} s.\n\n" + markdown_table(["file", "passed", "failed", "skipped"], lines)
    )


def models(report: dict[str, Any]) -> str:
    lines = [
        [
            *(row["shape"].upper(), f"{row['load_seconds']:.2f}", f"{row['load_gb_per_second']:.1f}"),
            *(f"{row['start_seconds']:.2f}", f"{row['largest_shard_mib']:.0f}", f"{row['host_peak_mib']:.0f}"),
            *(f"{row['gpu_peak_mib']:.0f}", f"{row['tokens_per_second']:.0f}"),
        ]
        for row in report["models"]
    ]
    head = ["shape", "load s", "GB/s", "start s", "largest shard MiB", "host peak MiB", "GPU peak MiB", "tok/s"]
    return markdown_table(head, lines)
