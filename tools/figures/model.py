"""Whole-model results, by `benchmark_model.py --json`; what is shown of them: `benchmarks.sections`."""

from __future__ import annotations

from benchmarks import plots as model_plots
from benchmarks import sections as model_sections
from benchmarks.peaks import KNOWN
from benchmarks.text_table import markdown_table, number
from tools.figures.provider import Plot, Results


def sections(results: Results) -> dict[str, str]:
    return model_sections.sections(list(results.values())) | {"known-peaks": _known_peaks()}


def other_runs(results: Results) -> dict[str, str]:
    """Tables of suites measured again, on a GPU of the same kind with another host, or against fewer modes of vLLM."""
    found = model_sections.sections(list(results.values()))
    return {f"other-runs-{name}": found[f"model-{name}"] for name in ("throughput", "conditions", "figures")}


def _known_peaks() -> str:
    rows = [[gpu, number(flops / 1e12, 0), number(bandwidth / 1e12, 3)] for gpu, (flops, bandwidth) in KNOWN.items()]
    return markdown_table(["GPU", "matrix product, TFLOP/s", "read bandwidth, TB/s"], rows)


def plots(results: Results) -> dict[str, Plot]:
    found = model_sections.plots(list(results.values()))
    return {name: Plot(data, model_plots.draw) for name, data in found.items()}
