"""Boxed tables of single-sequence cases, a box a case and a column a piece of hardware or software.

    +--------Case: llama2-7B, (Batch 1, Prefill 128, Decode  512)--------+
    | Hardware                 |  GPU-naive  |   GPU-opt   | VHK158 FPGA |
    | Prefill time (ms)        |      26.1   |      17.6   |      289.9  |
    ...

The last column is the subject: the speed-up row says how many times longer every column takes than it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cases import Case
from benchmarks.engines import FAMILIES
from benchmarks.record import Record

LABELS = ("Hardware", "Prefill time (ms)", "Decode time (ms)", "Total time (ms)", "Avg throughput (token/s)")


@dataclass(frozen=True)
class Column:
    """One column's figures for one case. decode_tokens: as many tokens took `decode_ms`. None: it failed."""

    name: str
    prefill_ms: float | None
    decode_ms: float | None
    decode_tokens: int

    @property
    def total_ms(self) -> float | None:
        return None if self.prefill_ms is None or self.decode_ms is None else self.prefill_ms + self.decode_ms

    @property
    def tokens_per_second(self) -> float | None:
        """Decode tokens over decode time: prefill has a row of its own."""
        return None if not self.decode_ms else self.decode_tokens / self.decode_ms * 1e3


def boxed_table(model: str, boxes: Sequence[tuple[Case, Sequence[Column]]]) -> str:
    """Boxes one under the other; every box has the same columns, and the last of them is the subject."""
    first_columns = boxes[0][1]
    subject = first_columns[-1].name
    labels = [*LABELS, f"{subject.split()[0]} speedup ratio"]
    label_width = max(map(len, labels))
    widths = [max(11, len(column.name)) for column in first_columns]
    lines: list[str] = []
    for case, columns in boxes:
        rows = [[f" {column.name.center(width)} " for column, width in zip(columns, widths, strict=True)]]
        for figure in ("prefill_ms", "decode_ms", "total_ms", "tokens_per_second"):
            rows.append([_cell(getattr(column, figure), 1, i, widths) for i, column in enumerate(columns)])
        ratios = [_ratio(column, columns[-1]) for column in columns]
        rows.append([_cell(value, 3, i, widths) for i, value in enumerate(ratios)])
        body = [f"| {label.ljust(label_width)} |{'|'.join(cells)}|" for label, cells in zip(labels, rows, strict=True)]
        inner = len(body[0]) - 2
        title = f"Case: {model}, (Batch {case.batch_size}, Prefill {case.input_len:3d}, Decode {case.output_len:4d})"
        lines += ["+" + title.center(inner, "-") + "+", *body]
    return "\n".join([*lines, "+" + "-" * inner + "+"])


def _cell(value: float | None, digits: int, index: int, widths: Sequence[int]) -> str:
    # The subject's figures stand one place further right than the others'.
    right = 2 if index == len(widths) - 1 else 3
    width = widths[index] + 2 - right
    return ("-" if value is None else f"{value:.{digits}f}").rjust(width) + " " * right


def _ratio(column: Column, subject: Column) -> float | None:
    mine, theirs = column.total_ms, subject.total_ms
    return None if mine is None or theirs is None else mine / theirs


def profile_boxes(record: Record, sampling: str, others: Sequence[dict[Case, Column]] = ()) -> str:
    """The boxes of a record: other hardware first, then the engines, the fastest mode of each, this one last."""
    families = [family for family in reversed(FAMILIES) if family in record.families()]
    boxes = []
    for case in record.cases():
        columns = [_other(hardware, case) for hardware in others]
        columns += [_engine_column(record, family, case, sampling) for family in families]
        boxes.append((case, columns))
    return boxed_table(record.model, boxes)


def _other(hardware: dict[Case, Column], case: Case) -> Column:
    name = next(iter(hardware.values())).name
    return hardware.get(case, Column(name, None, None, case.output_len))


def _engine_column(record: Record, family: str, case: Case, sampling: str) -> Column:
    best, label = record.best(family, case, sampling), FAMILIES[family]
    if best is None or best.metrics is None:
        return Column(label, None, None, case.output_len - 1)
    metrics = best.metrics
    decode = None if metrics.decode_seconds is None else metrics.decode_seconds * 1e3
    # The first token belongs to prefill.
    return Column(label, metrics.ttft * 1e3, decode, case.output_len - 1)
