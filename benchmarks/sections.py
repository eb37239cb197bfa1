"""What the README and the docs show of the results: named sections of Markdown, made from the records alone."""

from pathlib import Path

from benchmarks.boxed_tables import profile_boxes
from benchmarks.cases import SAMPLINGS
from benchmarks.engines import MODES
from benchmarks.plot_file import IMAGES
from benchmarks.plots import plot_data
from benchmarks.record import Record
from benchmarks.text_table import markdown_table, number
from benchmarks.throughput_tables import figures_table, startup_table, throughput_tables

NOTHING = "Not measured yet."
SUMMARY_SAMPLING = "mission"


def sections(records: list[Record]) -> dict[str, str]:
    """Name -> Markdown, with links to plots as seen from the root of the repository.

    model-summary, the first thing to read, is the whole suite; until that was run, all figures of what was.
    """
    suites = [record for record in records if record.suite == "seed" and record.measurements]
    profiles = [record for record in records if record.suite == "profile" and record.measurements]
    measured = [record for record in records if record.measurements]
    shown = {record.subject for record in suites if SUMMARY_SAMPLING in record.samplings()}
    summaries = [r for r in suites if SUMMARY_SAMPLING in r.samplings() or r.subject not in shown]
    parts = {
        "model-summary": [_summary(record) for record in summaries] or [_figures(record) for record in measured],
        "model-throughput": [throughput_tables(record, "####").strip() for record in suites],
        "model-profile": [_boxes(record) for record in profiles],
        "model-figures": [_figures(record) for record in measured],
        "model-startup": [_titled(record, startup_table(record)) for record in records if record.startup],
        "model-idle": _idle(records),
        "model-conditions": [_conditions(record) for record in measured],
    }
    return {name: "\n\n".join(part for part in found if part) or NOTHING for name, found in parts.items()}


def plots(records: list[Record]) -> dict[str, dict]:
    """File name -> data of every plot that the sections show."""
    return {
        plot_name(record, sampling): plot_data(record, sampling)
        for record in records
        if record.suite == "seed" and record.measurements
        for sampling in record.samplings()
    }


def plot_name(record: Record, sampling: str) -> str:
    card = record.subject.removeprefix(record.model).replace(" on ", "-").replace(" ", "-")
    return f"{record.suite}-{Path(record.model).name}{card}-{sampling}.png".lower()


def _summary(record: Record) -> str:
    """The tables and the plot of one way of sampling, that of SUMMARY_SAMPLING if it was measured."""
    names = record.samplings()
    sampling = SUMMARY_SAMPLING if SUMMARY_SAMPLING in names else names[0]
    picture = f"![throughput of {record.subject} by engine]({IMAGES}/{plot_name(record, sampling)})"
    return f"{throughput_tables(record, '###', only=sampling).strip()}\n\n{picture}"


def _boxes(record: Record) -> str:
    boxes = [
        f"{SAMPLINGS[name].title}:\n\n```\n{profile_boxes(record, name)}\n```"
        for name in record.samplings()
        if record.cases()
    ]
    return _titled(record, "\n\n".join(boxes))


def _figures(record: Record) -> str:
    return _titled(record, figures_table(record), _part(record))


def _idle(records: list[Record]) -> list[str]:
    """How long the GPU idled while decoding, one line a profiled case."""
    rows = []
    for record in records:
        for found in record.profiles:
            idle = found["gpu_idle_fraction"]
            waits = ", ".join(f"{name} {count}" for name, count in found["host_waits"].items()) or "none"
            rows.append([
                record.subject, str(found["batch_size"]), str(found["context_len"]), str(found["steps"]),
                number(found["untraced_us_per_step"], 1), "-" if idle is None else f"{idle:.2%}", waits,
            ])  # fmt: skip
    header = ("model", "batch", "context", "steps traced", "us a step, untraced", "GPU idle", "host waits")
    return [markdown_table(header, rows)] if rows else []


def _conditions(record: Record) -> str:
    """Under what conditions a record came about, and what must be known of it."""
    facts = record.environment
    peaks = record.peaks
    known = [
        f"{facts.get('device')}, driver {facts.get('driver', '-')}, torch {facts.get('torch')}, {record.created}",
        f"peaks: {number(_scaled(peaks.matrix_flops, 1e12), 0)} TFLOP/s, "
        f"read {number(_scaled(peaks.read_bandwidth, 1e12), 3)} TB/s ({peaks.source})",
        f"weights: {'random' if record.random_weights else 'from the checkpoint'}, "
        f"{str(record.dtype).removeprefix('torch.')}; repetitions: {record.settings.get('repeats')}",
    ]
    for name, details in record.engines.items():
        versions = [f"{key} {details[key]}" for key in ("vllm", "transformers", "kernels") if key in details]
        known.append(f"{MODES[name].label}: {', '.join(versions) or 'did not start'}")
    return _titled(record, "\n".join(f"- {line}" for line in known + record.notes + record.gaps()), _part(record))


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _part(record: Record) -> str:
    """Which part of a model's results: a suite may be in two files, one for each way of sampling."""
    names = record.samplings()
    return f", suite {record.suite}" + (f", {SAMPLINGS[names[0]].title}" if len(names) == 1 else "")


def _titled(record: Record, text: str, suffix: str = "") -> str:
    return f"#### {record.subject}{suffix}\n\n{text}"
