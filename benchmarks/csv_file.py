"""All measurements as CSV, a row each, for spreadsheets."""

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.metrics import Metrics
from benchmarks.record import Record

HEAD = ("model", "dtype", "engine", "sampling", "batch_size", "input_len", "output_len", "repetitions")
METRICS = tuple(field.name for field in fields(Metrics))
TAIL = ("peak_memory_mib", "error")
COLUMNS = HEAD + METRICS + TAIL


def write_csv(record: Record, path: Path) -> None:
    """Write COLUMNS; cells without a value stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for m in record.measurements:
            row: dict[str, Any] = {
                "model": record.model,
                "dtype": str(record.dtype).removeprefix("torch."),
                "engine": m.engine,
            }
            row |= {"sampling": m.sampling, "batch_size": m.case.batch_size, "input_len": m.case.input_len}
            row |= {"output_len": m.case.output_len, "repetitions": len(m.timing.total) if m.timing else 0}
            row |= m.metrics.to_json() if m.metrics else {}
            row |= {"peak_memory_mib": m.peak_memory[0] if m.peak_memory else None, "error": m.error}
            writer.writerow(row)
