"""Tables of a decode profile: each op's time a step against the time that its bytes take at the read bandwidth."""

from typing import Any

import torch

from benchmarks.layer import product_shapes
from benchmarks.peaks import Peaks
from benchmarks.text_table import markdown_table, number
from llama3.config import ModelConfig

NUM_KERNELS = 20
LONGEST_NAME = 70


def op_bytes(config: ModelConfig, dtype: torch.dtype, op: str, batch_size: int, context_len: int) -> int | None:
    """Bytes that all calls of `op` in one decode step must read: matrices once, K and V of each context, logits.

    None for what is no op of the model.
    """
    elements = {name: config.num_layers * rows * size for name, (rows, size) in product_shapes(config).items()}
    elements |= {
        "head": config.embedding_parameters,
        "embed": batch_size * config.hidden_size,
        "sample": batch_size * config.vocab_size,
    }
    if op == "attention":
        return batch_size * context_len * config.kv_bytes_per_token(dtype)
    return elements[op] * dtype.itemsize if op in elements else None


def op_tables(tables: dict[str, Any], config: ModelConfig, dtype: torch.dtype, peaks: Peaks) -> str:
    """Everything that `decode_profile.profile_decode` found, as text."""
    batch_size, context_len, untraced = (tables[key] for key in ("batch_size", "context_len", "untraced_us_per_step"))
    moved = config.decode_weight_bytes(dtype) + batch_size * context_len * config.kv_bytes_per_token(dtype)
    floor = (
        "" if peaks.read_bandwidth is None else f", {moved / peaks.read_bandwidth / untraced * 1e6:.1%} of its floor"
    )
    lines = [
        f"decode, batch {batch_size}, context about {context_len}: {tables['steps']} steps in "
        f"{tables['window_us'] / 1e3:.2f} ms; without tracing a step takes {untraced:.1f} us{floor}"
    ]
    if tables["gpu_idle_fraction"] is not None:
        waits = ", ".join(f"{name} {count}" for name, count in tables["host_waits"].items()) or "none"
        lines.append(f"GPU idle: {tables['gpu_idle_fraction']:.2%}; host waits: {waits}")
    if tables["ops"]:
        lines += ["", _ops(tables, config, dtype, peaks)]
    if tables["kernels"]:
        per_step = [
            [row["name"][:LONGEST_NAME], str(row["calls"]), number(row["us"] / row["calls"], 2), number(row["us"], 0)]
            for row in tables["kernels"][:NUM_KERNELS]
        ]
        lines += ["", markdown_table(("kernel", "calls", "us a call", "us in all"), per_step)]
    return "\n".join(lines)


def _ops(tables: dict[str, Any], config: ModelConfig, dtype: torch.dtype, peaks: Peaks) -> str:
    """A line an op; the time includes the gap before it, so the lines add up to the step."""
    steps, rows = tables["op_steps"], []
    total = floor_total = 0.0
    for row in tables["ops"]:
        us = row["us"] / steps
        moved = op_bytes(config, dtype, row["name"], tables["batch_size"], tables["context_len"])
        floor = None if moved is None or peaks.read_bandwidth is None else moved / peaks.read_bandwidth * 1e6
        total, floor_total = total + us, floor_total + (floor or 0.0)
        rate = None if moved is None else moved / us / 1e3
        rows.append([row["name"], number(row["calls"] / steps, 1), *_figures(us, floor, rate)])
    rows.append(["step", "", *_figures(total, floor_total or None, None)])
    return markdown_table(("op", "calls a step", "us a step", "floor us", "of floor", "GB/s"), rows)


def _figures(us: float, floor: float | None, rate: float | None) -> list[str]:
    share = "-" if floor is None or us <= 0 else f"{floor / us:.1%}"
    return [number(us, 2), number(floor, 2), share, number(rate, 0)]
