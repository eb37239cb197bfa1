"""Which plan of `batch_linear` is best for each product of a layer, on the GPU at hand.

    python -m benchmarks.product_plans --shape 8b --tokens 64 [--context 128] [--json OUT]

The whole decode step is timed, because products follow one another closely; one product's plan is changed at a time,
and the best is kept while the next one's is looked for. The products run in batch_linear even where cuBLASLt would.
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
from llama3.ops.batch_linear import Plan
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU

FORMS = {"qkv": NORM_LINEAR, "o": LINEAR_ADD, "gate-up": NORM_SWIGLU, "down": LINEAR_ADD}
PLANS = [
    Plan(splits, kib << 10, trigger)
    for splits, kib, trigger in itertools.product(batch_linear.SPLITS, (106, 150, 200), (0, 2))
]


def search(
    names: Iterable[str], plans: Iterable[Plan], measure: Callable[[Mapping[str, Plan]], float | None]
) -> list[tuple[str, Plan, float]]:
    """(product, its best plan, the step's time with it and the best ones of the products before), product by product.

    measure: the step's time under the plans given, products that are not in it under their own; None where a plan
    cannot run. A product for which none can is left out.
    """
    best: dict[str, Plan] = {}
    found = []
    for name in names:
        times = {plan: measure(best | {name: plan}) for plan in plans}
        possible = {plan: time for plan, time in times.items() if time is not None}
        if possible:
            best[name] = min(possible, key=possible.__getitem__)
            found.append((name, best[name], possible[best[name]]))
    return found


def run(shape: str, num_tokens: int, context: int) -> dict[str, Any]:
    step = Step(shape)
    decode, own = step.decode(num_tokens, context), batch_linear.choose_plan
    products = {name: (FORMS[name], *size) for name, size in product_shapes(step.config).items()}

    def measure(plans: Mapping[str, Plan]) -> float | None:
        chosen = {products[name]: plan for name, plan in plans.items()}

        def choose(form: int, num_tokens: int, num_rows: int, size: int, num_sms: int) -> Plan:
            return chosen.get((form, num_rows, size)) or own(form, num_tokens, num_rows, size, num_sms)

        with mock.patch.object(batch_linear, "choose_plan", choose):
            try:
                return median_microseconds([decode], REPEATS)
            except ValueError:  # no room for it, or too many splits
                return None

    with mock.patch.object(linear, "ONE_KERNEL", ()):
        library = median_microseconds([decode], REPEATS)
    with mock.patch.object(batch_linear, "_has_fast_memory", lambda device: False):
        own_us, found = measure({}), search(products, PLANS, measure)
    rows = [{"product": name, "plan": plan._asdict(), "us": us} for name, plan, us in found]
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
    for row in found["rows"]:
        print(f"{row['product']:8} {row['plan']}: {row['us']:.0f}")
    if args.json is not None:
        write_json(found, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
