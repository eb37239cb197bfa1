"""Turn ncu's CSV (stdin, or a file) into a table: kernel, launches, median duration, DRAM bytes, bandwidth, % of peak.

ncu --csv --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed … \\
    python benchmark_kernel.py --use_ncu … | python tools/ncu_table.py

With `--json FILE --label NAME` the first kernel's row is also stored in FILE under NAME, which docs are made from.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

DURATION, BYTES = "gpu__time_duration.sum", "dram__bytes_read.sum"
THROUGHPUT = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
TOOL = "ncu --clock-control none --cache-control all, medians over the launches"
SCALE = {
    "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0,
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class KernelRow:
    """Medians over the launches of one kernel: seconds, bytes read from DRAM, percent of the DRAM peak."""

    name: str
    launches: int
    seconds: float
    dram_bytes: float
    dram_percent: float


def parse(lines: Iterable[str]) -> list[KernelRow]:
    """Rows of ncu's long CSV format; lines before its header (the program's own output) are skipped.

    Raises ValueError when there is no such header or a metric has an unknown unit.
    """
    text = iter(lines)
    header = next((line for line in text if line.startswith('"ID"')), None)
    if header is None:
        raise ValueError("no ncu CSV in the input: run ncu with --csv and the metrics in this file's docstring")
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in csv.DictReader([header, *text]):
        if not record.get("Metric Name"):
            continue
        unit = record["Metric Unit"]
        if unit not in SCALE:
            raise ValueError(f"{record['Metric Name']} has the unknown unit '{unit}'")
        number = float(record["Metric Value"].replace(",", ""))
        values[record["Kernel Name"]][record["Metric Name"]].append(number * SCALE[unit])
    return [
        KernelRow(
            _short(name),
            len(m[DURATION]),
            *(statistics.median(m[key]) if m[key] else 0.0 for key in (DURATION, BYTES, THROUGHPUT)),
        )
        for name, m in values.items()
    ]


def _short(name: str) -> str:
    return re.sub(r"\(.*", "", re.sub(r"^void |\((?:\w+::)*\w+\)(?=\w)", "", name))


def table(rows: list[KernelRow]) -> str:
    lines = [
        "| kernel | launches | duration (us) | DRAM read (MB) | TB/s | % of DRAM peak |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        rate = r.dram_bytes / r.seconds / 1e12 if r.seconds else 0.0
        lines.append(
            f"| {r.name} | {r.launches} | {r.seconds * 1e6:.2f} | {r.dram_bytes / 1e6:.1f} | {rate:.3f} "
            f"| {r.dram_percent:.1f} |"
        )
    return "\n".join(lines)


def store(row: KernelRow, path: Path, label: str) -> None:
    """Put a kernel's medians into the JSON at `path`, in place of what it held under `label`."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    entry = {
        "label": label,
        "launches": row.launches,
        "us": round(row.seconds * 1e6, 2),
        "dram_MB": round(row.dram_bytes / 1e6, 1),
        "percent_of_dram_peak": round(row.dram_percent, 1),
    }
    kept = [other for other in rows if other["label"] != label]
    path.write_text(json.dumps({"tool": TOOL, "rows": [*kept, entry]}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="?", type=Path, help="ncu's CSV (default: standard input)")
    parser.add_argument("--json", type=Path, help="result file to store the first kernel's row in")
    parser.add_argument("--label", help="its name there: the benchmark suite's name of the shape")
    args = parser.parse_args()
    if (args.json is None) != (args.label is None):
        parser.error("--json and --label go together")
    try:
        rows = parse(args.csv.read_text().splitlines() if args.csv else sys.stdin)
    except ValueError as error:
        print(f"ncu_table.py: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.json is not None:
        store(rows[0], args.json, args.label)
    return 0


if __name__ == "__main__":
    sys.exit(main())
