"""Whole-model results, by `benchmark_model.py --json`; what is shown of them: `benchmarks.sections`."""

from __future__ import annotations

from benchmarks import plots as model_plots
from benchmarks import sections as model_sections
from tools.figures.provider import Plot, Results


def sections(results: Results) -> dict[str, str]:
    return model_sections.sections(list(results.values()))


def plots(results: Results) -> dict[str, Plot]:
    found = model_sections.plots(list(results.values()))
    return {name: Plot(data, model_plots.draw) for name, data in found.items()}
