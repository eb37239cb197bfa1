"""Which plan of `batch_linear` is best for each product of a layer, on the GPU at hand.

    python -m benchmarks.product_plans --shape 8b --tokens 64 [--context 128] [--json OUT]

The whole decode step is timed, because products follow one another closely; one product's plan is changed at a time,
and the best is kept while the next one's is looked for. The products run in batch_linear even where others would.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.decode_products import REPEATS, Step
from benchmarks.environment import describe
from benchmarks.graph_timing import median_microseconds
from benchmarks.json_file import write_json
from benchmarks.layer import product_shapes
from llama3.errors import UserError
from llama3.ops import batch_linear, linear
from llama3.ops.batch_linear import TILE_ROWS, Plan
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU

ORDER = ("gate-up", "down", "qkv", "o")  # by how much they read
FORMS = {"qkv": NORM_LINEAR, "o": LINEAR_ADD, "gate-up": NORM_SWIGLU, "down": LINEAR_ADD}
KIB, TRIGGERS, AHEADS = (106, 150, 170, 200), (0, 2), (batch_linear.AHEAD, batch_linear.MAX_STAGES)


def plans_for(form: int, num_rows: int, num_tokens: int) -> list[Plan]:
    """Tiles of 128 rows, and those of which every cluster has one."""
    return [
        Plan(splits, kib << 10, trigger, tile_rows, ahead)
        for splits, kib, trigger, ahead in itertools.product(batch_linear.SPLITS, KIB, TRIGGERS, AHEADS)
        for tile_rows in sorted({TILE_ROWS, batch_linear.one_round_rows(form, num_rows, num_tokens, splits)})
    ]


def search(
    plans: Mapping[str, Iterable[Plan]], measure: Callable[[Mapping[str, Plan]], float | None]
) -> dict[str, dict[Plan, float]]:
    """Of each product in `plans`, the step's time by plan, the fastest first; products before it have their best.

    measure: the step's time under the plans given, products that are not in it under their own; None where a plan
    cannot run. A product for which none can is left out.
    """
    best: dict[str, Plan] = {}
    found = {}
    for name, candidates in plans.items():
        times = {plan: time for plan in candidates if (time := measure(best | {name: plan})) is not None}
        if times:
            found[name] = dict(sorted(times.items(), key=lambda item: item[1]))
            best[name] = next(iter(found[name]))
    return found


def run(shape: str, num_tokens: int, context: int) -> dict[str, Any]:
    step = Step(shape)
    decode, own = step.decode(num_tokens, context), batch_linear.choose_plan
    products = {name: (FORMS[name], *size) for name, size in product_shapes(step.config).items()}

    def measure(plans: Mapping[str, Plan]) -> float | None:
        chosen = {products[name]: plan for name, plan in plans.items()}

        def choose(form: int, num_tokens: int, num_rows: int, size: int, *gpu: Any) -> Plan:
            return chosen.get((form, num_rows, size)) or own(form, num_tokens, num_rows, size, *gpu)

        with mock.patch.object(batch_linear, "choose_plan", choose):
            try:
                return median_microseconds([decode], REPEATS)
            except ValueError:  # no room for it, or too many splits
                return None

    with mock.patch.object(linear, "ONE_KERNEL", ()):
        library = median_microseconds([decode], REPEATS)
    everywhere = mock.patch.object(batch_linear, "FAST_MEMORY_TOKENS", batch_linear.MAX_TOKENS)
    with everywhere, mock.patch.object(linear, "ONE_KERNEL", (batch_linear,)):
        own_us = measure({})
        found = search({name: plans_for(*products[name][:2], num_tokens) for name in ORDER}, measure)
    rows = [
        {"product": name, "plan": plan._asdict(), "us": us}
        for name, times in found.items()
        for plan, us in times.items()
    ]
    facts = {"shape": shape, "tokens": num_tokens, "context_len": context}
    return describe() | facts | {"cublaslt_us": library, "own_us": own_us, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        found = run(args.shape, args.tokens, args.context)
    except UserError as error:
        print(f"benchmarks.product_plans: {error}", file=sys.stderr)
        return 2
    print(f"a step in us: cuBLASLt {found['cublaslt_us']:.0f}, plans as chosen {found['own_us']:.0f}, then with")
    for name, rows in itertools.groupby(found["rows"], lambda row: row["product"]):
        for row in itertools.islice(rows, 3):
            print(f"{name:8} {row['plan']}: {row['us']:.0f}")
    if args.json is not None:
        write_json(found, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
