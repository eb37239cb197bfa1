"""Which plan of `batch_linear` is best for each product of a layer, on the GPU at hand.

    python -m benchmarks.product_plans --shape 8b --tokens 64 [--context 128] [--json OUT]

The whole decode step is timed, because products follow one another closely; one product's plan is changed at a time,
and the best is kept while the next one's is looked for. The products run in batch_linear even where cuBLASLt would.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from unittest import mock

from benchmarks.decode_products import REPEATS, Step
from benchmarks.environment import describe
from benchmarks.graph_timing import microseconds
from llama3.config import ModelConfig
from llama3.ops import batch_linear, linear
from llama3.ops.batch_linear import Plan
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU

Product = tuple[int, int, int]  # form, rows and columns of the weight
PLANS = [
    Plan(splits, kib << 10, trigger)
    for splits, kib, trigger in itertools.product(batch_linear.SPLITS, (106, 150, 200), (0, 2))
]


def products(config: ModelConfig) -> dict[str, Product]:
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": (NORM_LINEAR, config.qkv_size, hidden),
        "o": (LINEAR_ADD, hidden, config.q_size),
        "gate-up": (NORM_SWIGLU, 2 * inner, hidden),
        "down": (LINEAR_ADD, hidden, inner),
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    step = Step(args.shape)
    decode, of_layer, own = step.decode(args.tokens, args.context), products(step.config), batch_linear.choose_plan

    def time() -> float:
        return statistics.median(microseconds([decode], REPEATS))

    def measure(plans: Mapping[str, Plan]) -> float | None:
        chosen = {of_layer[name]: plan for name, plan in plans.items()}

        def choose(form: int, num_tokens: int, num_rows: int, size: int, num_sms: int) -> Plan:
            return chosen.get((form, num_rows, size)) or own(form, num_tokens, num_rows, size, num_sms)

        with mock.patch.object(batch_linear, "choose_plan", choose):
            try:
                return time()
            except ValueError:  # no room for it, or too many splits
                return None

    with mock.patch.object(linear, "ONE_KERNEL", ()):
        library = time()
    with mock.patch.object(batch_linear, "_has_fast_memory", lambda device: False):
        chosen = time()
        found = search(of_layer, PLANS, measure)
    print(f"{args.shape}, {args.tokens} tokens, context {args.context}: cuBLASLt {library:.0f} us, ours {chosen:.0f}")
    for name, plan, microseconds_a_step in found:
        print(f"{name:8} {plan}: {microseconds_a_step:.0f}")
    if args.json is not None:
        rows = [{"product": name, "plan": plan._asdict(), "us": us} for name, plan, us in found]
        document = {"shape": args.shape, "tokens": args.tokens, "context_len": args.context}
        document |= {"cublaslt_us": library, "chosen_us": chosen, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(describe() | document, indent=1) + "\n")


if __name__ == "__main__":
    main()
