"""The plans of products that were found fastest on an H200, of both families (benchmarks/product_plans.py)."""

import functools
import json
from pathlib import Path

from llama3.ops.one_kernel import FORMS

TABLE = Path(__file__).with_name("plan_table.json")
DEVICE, NUM_SMS = "NVIDIA H200", 132

Shape = tuple[int, int, int, int]  # the form's number, the tokens that the kernel is compiled for, rows, size


@functools.cache
def plans() -> dict[tuple[str, Shape], dict[str, int]]:
    """The fields of each plan, by family and shape."""
    rows = json.loads(TABLE.read_text())
    return {(r["family"], (FORMS[r["form"]], r["tokens"], r["num_rows"], r["size"])): r["plan"] for r in rows}


def look_up(family: str, shape: Shape, num_sms: int, fast_memory: bool) -> dict[str, int] | None:
    """The plan found for that product; None if there is none, or the GPU is another."""
    return plans().get((family, shape)) if fast_memory and num_sms == NUM_SMS else None
