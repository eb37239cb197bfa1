"""A plot of a record: for each case the throughput of every engine, and the floor's. Needs matplotlib."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from benchmarks.cases import SAMPLINGS
from benchmarks.engines import FAMILIES
from benchmarks.record import Record
from llama3.errors import RequestError

COLOURS = {"ours": "#1f6f8b", "vllm": "#d98e04", "hf": "#8c8c8c"}
COLUMNS = 4
DIGEST_KEY = "Data-SHA256"  # of the plotted data, inside the PNG: tells whether a plot is up to date


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


def data_digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw(data: dict[str, Any], path: Path) -> None:
    """Write a PNG of some tens of kilobytes. Raises RequestError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RequestError("plots need matplotlib: pip install matplotlib") from error
    panels = data["panels"]
    columns = min(COLUMNS, len(panels)) or 1
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(3.0 * columns, 2.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={DIGEST_KEY: data_digest(data), "Software": None})


def digest_in_png(path: Path) -> str | None:
    """The digest that `draw` wrote into a PNG; None if there is no such file or no digest in it."""
    if not path.exists():
        return None
    content, position = path.read_bytes(), 8
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        body = content[position + 8 : position + 8 + length]
        if kind == b"tEXt" and body.startswith(DIGEST_KEY.encode() + b"\0"):
            return body.split(b"\0", 1)[1].decode("latin-1")
        position += length + 12
    return None
