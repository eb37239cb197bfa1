"""The throughput tables, batched and single user, with the engines side by side; and the figures behind them."""

from benchmarks.cases import SAMPLINGS, Case
from benchmarks.engines import FAMILIES, MODES
from benchmarks.metrics import decode_bytes, floor_tokens_per_second, ratio
from benchmarks.record import Measurement, Record
from benchmarks.text_table import markdown_table, number

BATCHED_TITLE, SINGLE_TITLE = "Batched inference", "Single user inference"


def throughput_tables(record: Record, heading: str = "###", only: str | None = None) -> str:
    """Tokens a second of each engine, prefill included; a family with several modes shows its fastest.

    only: the name of one way of sampling, in place of all.
    """
    parts = []
    for sampling in record.samplings() if only is None else [only]:
        for title, batched in ((BATCHED_TITLE, True), (SINGLE_TITLE, False)):
            cases = [case for case in record.cases() if (case.batch_size > 1) == batched]
            if cases:
                parts += [f"{heading} {title}: {record.subject}, {SAMPLINGS[sampling].title}", ""]
                parts += [_table(record, cases, sampling), ""]
    return "\n".join(parts)


def _table(record: Record, cases: list[Case], sampling: str) -> str:
    families = record.families()
    header = ["Batch Size", "Input / Output Toks", *(f"{FAMILIES[f]} Throughput" for f in families)]
    others = [f for f in families if f != "ours"] if "ours" in families else []
    header += [f"Custom / {FAMILIES[f]}" for f in others]
    rows = []
    for case in cases:
        best = {family: record.best(family, case, sampling) for family in families}
        row = [str(case.batch_size), f"{case.input_len}, {case.output_len}"]
        row += [_cell(record, family, case, sampling, best[family]) for family in families]
        row += [number(ratio(_throughput(best["ours"]), _throughputs(best[f])), 2, "x") for f in others]
        rows.append(row)
    return markdown_table(header, rows)


def _cell(record: Record, family: str, case: Case, sampling: str, best: Measurement | None) -> str:
    if best is not None:
        return number(_throughput(best), 2)
    tried = any(
        MODES[m.engine].family == family for m in record.measurements if (m.case, m.sampling) == (case, sampling)
    )
    return "failed" if tried else "-"


def _throughput(measurement: Measurement | None) -> float | None:
    return None if measurement is None or measurement.metrics is None else measurement.metrics.throughput


def _throughputs(measurement: Measurement | None) -> list[float]:
    value = _throughput(measurement)
    return [] if value is None else [value]


FIGURES_HEADER = (
    "engine", "batch, in/out", "sampling", "runs", "tok/s", "spread", "TTFT ms", "TPOT ms", "prefill tok/s", "MFU",
    "decode tok/s", "decode GB/s", "of floor",
)  # fmt: skip


def figures_table(record: Record) -> str:
    """Every figure of every measurement, each mode of each engine on a line of its own."""
    rows = []
    for m in record.measurements:
        name = [MODES[m.engine].label, f"{m.case.batch_size}, {m.case.input_len}/{m.case.output_len}", m.sampling]
        x = m.metrics
        name.append(str(len(m.timing.total)) if m.timing else "-")
        if x is None:
            rows.append([*name, "failed", *["-"] * (len(FIGURES_HEADER) - 5)])
            continue
        spread = (x.throughput_high - x.throughput_low) / x.throughput
        rows.append([
            *name, number(x.throughput, 1), f"{spread:.1%}", number(x.ttft * 1e3, 2), number(x.tpot_ms, 4),
            number(x.prefill_tok_s, 0), _percent(x.prefill_mfu), number(x.decode_tok_s, 1), number(x.decode_gb_s, 0),
            _percent(x.decode_floor_fraction),
        ])  # fmt: skip
    return markdown_table(FIGURES_HEADER, rows)


def startup_table(record: Record) -> str:
    """Seconds from process start to first token, by engine."""
    rows = []
    for name, found in record.startup.items():
        label = MODES[name].label
        if "error" in found:
            rows.append([label, "failed", "-", "-"])
            continue
        runs = ", ".join(f"{seconds:.1f}" for seconds in found["seconds"])
        rows.append([label, number(found["median"], 1), runs, number(found["first"], 1)])
    header = ("engine", "process start to first token, s", "repetitions", "first time")
    return markdown_table(header, rows)


def floors_table(record: Record, cases: tuple[Case, ...]) -> str:
    """What the memory allows, before anything is measured: decode bytes over the bandwidth peak."""
    rows = [
        [
            str(case),
            number(decode_bytes(record.config, record.dtype, case) / 1e9, 2),
            number(floor_tokens_per_second(record.config, record.dtype, case, record.peaks), 1),
        ]
        for case in cases
    ]
    return markdown_table(("batch x in/out", "decode reads GB", "decode floor tok/s"), rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
