"""Markdown tables whose source is aligned too."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of strings, every column as wide as its widest cell."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "| " + " | ".join("-" * width for width in widths) + " |", *map(line, rows)])


def number(value: float | None, digits: int, suffix: str = "") -> str:
    """A fixed number of decimals, or a dash where there is no value."""
    return "-" if value is None else f"{value:.{digits}f}{suffix}"
