"""A plot of a record: for each case the throughput of every engine, and the floor's. Needs matplotlib."""

from pathlib import Path
from typing import Any

from benchmarks.cases import SAMPLINGS
from benchmarks.engines import FAMILIES
from benchmarks.plot_file import new_figure, save
from benchmarks.record import Record

COLOURS = {"ours": "#1f6f8b", "vllm": "#d98e04", "hf": "#8c8c8c"}
COLUMNS = 4


def plot_data(record: Record, sampling: str) -> dict[str, Any]:
    """Everything that the plot shows: a panel a case, with tokens a second by family."""
    panels = []
    for case in sorted(record.cases(), key=lambda case: case.batch_size == 1):  # the order of a suite, batched first
        best = {family: record.best(family, case, sampling) for family in record.families()}
        bars = {f: round(m.metrics.throughput, 1) for f, m in best.items() if m is not None and m.metrics}
        floors = [m.metrics.decode_floor_tok_s for m in best.values() if m is not None and m.metrics]
        floor = next((round(value, 1) for value in floors if value is not None), None)
        name = f"batch {case.batch_size}, {case.input_len}/{case.output_len}"
        panels.append({"title": name, "bars": bars, "floor": floor})
    title = f"{record.model}, {record.environment.get('device', '')}, {SAMPLINGS[sampling].title}"
    return {"title": f"Generated tokens a second, prefill included: {title}", "panels": panels}


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the plot as a PNG. Raises RequestError where matplotlib is not installed."""
    panels = data["panels"]
    columns = min(COLUMNS, len(panels)) or 1
    rows = max(1, -(-len(panels) // columns))
    figure = new_figure(3.0 * columns, 2.6 * rows + 0.4)
    figure.suptitle(data["title"], fontsize=10)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        names, values = list(panel["bars"]), list(panel["bars"].values())
        bars = axes.bar([FAMILIES[n] for n in names], values, color=[COLOURS[n] for n in names], width=0.6)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
        top = max([*values, panel["floor"] or 0.0, 1e-9])
        if panel["floor"] is not None:
            axes.axhline(panel["floor"], color="black", linestyle="--", linewidth=0.8)
            axes.annotate("decode floor", (1.0, panel["floor"]), xycoords=("axes fraction", "data"), fontsize=6,
                          ha="right", va="bottom")  # fmt: skip
        axes.set_ylim(0, top * 1.15)
        axes.set_title(panel["title"], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, data, path)
