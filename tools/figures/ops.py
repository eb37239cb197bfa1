"""The ops by themselves: products by `python -m benchmarks.ops`, elementwise kernels, attention over prompts."""

from __future__ import annotations

from typing import Any

from benchmarks.large_products import table as large_products_table
from benchmarks.ops import floor_us
from benchmarks.sections import NOTHING
from benchmarks.text_table import markdown_table
from tools.figures.provider import Results

KERNELS = {"rms_norm": "RMSNorm", "silu_mul": "SiLU-and-multiply", "rope_append": "rotate and append"}
LIBRARIES = ("cuDNN", "FlashAttention 2")


def sections(results: Results) -> dict[str, str]:
    record = results["h200"]
    return {
        "ops-products": products(record),
        "ops-elementwise": elementwise(record.get("elementwise", [])),
        "ops-prefill-attention": prefill_attention(record.get("prefill_attention", [])),
    }


def many_tokens(results: Results) -> dict[str, str]:
    return {"ops-large-products": large_products_table(results["h200"]["rows"])}


def few_tokens(results: Results) -> dict[str, str]:
    """A table a GPU, a line a context and number of tokens, a column a model: our kernels, cuBLASLt at its better run,
    the floor."""
    return {"ops-few-tokens": "\n\n".join(_steps(record) for record in results.values()) or NOTHING}


def plans(results: Results) -> dict[str, str]:
    """A line a search and context: the step with the plans that it began with, and with those that it found."""
    lines = [
        [
            f"{found['shape'].upper()}{', again' if name.endswith('-again') else ''}",
            *(str(value) for value in (found["tokens"], row["context_len"])),
            *(f"{row[key]:.0f}" for key in ("before_us", "us")),
            f"{row['us'] / row['before_us'] - 1:+.1%}",
        ]
        for name, found in sorted(results.items(), key=lambda item: (item[1]["shape"], item[1]["tokens"], item[0]))
        for row in sorted(found["rows"], key=lambda row: row["context_len"])
    ]
    return {"ops-plans": markdown_table(["model", "rows", "context", "before, µs", "found, µs", ""], lines)}


def _steps(record: dict[str, Any]) -> str:
    cells = {
        (row["context_len"], row["tokens"], row["shape"]): (
            f"{row['ours_us']:.0f}, {min(row['cublaslt_us'], row['cublaslt_again_us']):.0f}, {row['floor_us']:.0f}"
        )
        for row in record["rows"]
    }
    shapes = list(dict.fromkeys(shape for _, _, shape in cells))
    lines = [
        [str(context), str(tokens), *(cells.get((context, tokens, shape), "–") for shape in shapes)]
        for context, tokens in sorted({key[:2] for key in cells})
    ]
    header = ["context", "tokens", *(shape.upper() for shape in shapes)]
    read = f"{record['device']}, {record['read_bandwidth'] / 1e12:.2f} TB/s read"
    return f"{read}:\n\n{markdown_table(header, lines)}"


def products(record: dict[str, Any]) -> str:
    """A line a projection, a column a number of tokens."""
    cells = {}
    for row in record["rows"]:
        cells[f"{row['model'].upper()} {row['op']}", row["tokens"]] = _timed(
            row["us"], floor_us(row, record) / row["us"]
        )
    return _by_tokens("µs (share of the floor)", cells)


def elementwise(rows: list[dict[str, Any]]) -> str:
    """A line a kernel and model, a column a number of tokens."""
    cells = {}
    for row in sorted(rows, key=lambda row: (row["model"], list(KERNELS).index(row["kernel"]))):
        label = f"{row['model'].upper()} {KERNELS[row['kernel']]}"
        cells[label, row["tokens"]] = _timed(row["us"], row["of_floor"])
    return _by_tokens("µs (share of the read-bandwidth floor)", cells)


def prefill_attention(rows: list[dict[str, Any]]) -> str:
    """A line a batch of prompts: one layer's time in each library, and what cuDNN's first call of a shape costs."""
    by_batch: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        label = f"{row['model'].upper()}, {row['sequences']} × {row['length']}"
        by_batch.setdefault(label, {})[row["library"]] = row
    lines = []
    for label, found in by_batch.items():
        times = [f"{found[name]['us']} ({found[name]['tflops']})" for name in LIBRARIES]
        lines.append([label, *times, f"{found['cuDNN']['first_call_ms']:.0f} ms"])
    return markdown_table(["one layer, µs (TFLOP/s)", *LIBRARIES, "cuDNN's first call"], lines) if lines else NOTHING


def _timed(us: float, share: float) -> str:
    return f"{us:.1f} ({share:.0%})"


def _by_tokens(title: str, cells: dict[tuple[str, int], str]) -> str:
    counts = sorted({tokens for _, tokens in cells})
    lines = [[label, *(cells.get((label, n), "") for n in counts)] for label in dict.fromkeys(key[0] for key in cells)]
    return markdown_table([title, *(f"{n} tokens" for n in counts)], lines) if lines else NOTHING
