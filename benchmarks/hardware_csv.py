"""Figures of other hardware, read from a CSV, as further columns of the boxed tables.

Columns: hardware, batch_size, prefill, decode, prefill_ms, decode_ms; others are ignored. `decode` is the number of
tokens that took decode_ms.
"""

import csv
from pathlib import Path

from benchmarks.boxed_tables import Column
from benchmarks.cases import Case
from llama3.errors import RequestError

FIELDS = ("hardware", "batch_size", "prefill", "decode", "prefill_ms", "decode_ms")


def read_hardware_csv(path: Path) -> list[dict[Case, Column]]:
    """For each hardware, in the order of the file, its column of each case. Raises RequestError, naming the line."""
    try:
        text = path.read_text()
    except OSError as error:
        raise RequestError(f"--hardware_csv: {path} cannot be read ({error.strerror})") from error
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in FIELDS if name not in (reader.fieldnames or [])]
    if missing:
        raise RequestError(f"{path}: the columns {', '.join(missing)} are missing; needed are {', '.join(FIELDS)}")
    hardware: dict[str, dict[Case, Column]] = {}
    for row in reader:
        try:
            case = Case(int(row["batch_size"]), int(row["prefill"]), int(row["decode"]))
            column = Column(row["hardware"], float(row["prefill_ms"]), float(row["decode_ms"]), case.output_len)
        except (TypeError, ValueError) as error:
            raise RequestError(f"{path}: line {reader.line_num} is not a case ({error})") from error
        hardware.setdefault(column.name, {})[case] = column
    if not hardware:
        raise RequestError(f"{path}: there is no row in it")
    return list(hardware.values())
