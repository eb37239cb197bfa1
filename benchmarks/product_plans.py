"""Which plans are best for the products of a layer in a decode step, on the GPU at hand.

    python -m benchmarks.product_plans --shape 8b --tokens 64 --seconds 60 --json results/product_plans/8b-64.json
    python -m benchmarks.product_plans --table

The whole decode step is timed, because products follow one another closely: what one leaves of a multiprocessor is what
the next may have before its turn. From the plans in use, one product's is changed at random at a time; what is faster
stays, if it was each time that the two were compared. --table writes what was found, of all results in the tree, where
`llama3/ops/plan_table.py` reads it.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.decode_products import Step, numbers
from benchmarks.environment import describe
from benchmarks.graph_timing import capture, median_microseconds, replay_seconds
from benchmarks.json_file import write_json
from benchmarks.layer import product_shapes
from llama3.errors import UserError
from llama3.ops import batch_linear, batch_plans, linear, one_kernel, skinny_linear, skinny_plans
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU
from llama3.ops.plan_table import DEVICE, TABLE
from llama3.shapes import shape_config

Plans = dict[str, Any]  # a Plan by product, all of one family

RESULTS = Path(__file__).resolve().parents[1] / "results" / "product_plans"
FORMS = {"qkv": NORM_LINEAR, "o": LINEAR_ADD, "gate-up": NORM_SWIGLU, "down": LINEAR_ADD}
NAMES = {number: name for name, number in one_kernel.FORMS.items()}
ROWS_MULTIPLE = one_kernel.ROWS_MULTIPLE
MOST = batch_plans.MAX_STAGES
CHOICES: dict[str, tuple[int, ...]] = {
    "shared_bytes": tuple(k << 10 for k in (60, 74, 82, 90, 98, 104, 106, 112, 124, 140, 150, 170, 200)),
    "trigger": (0, 1, 2, 3, 4, 6, 8, 12, 16, 24),
    "ahead": (0, 1, 2, 3, 4, 5, 6, 8, 10, MOST),
    "x_stages": (2, 3, 4, 5, 6, 8, MOST),
}
NEW_CUT = 0.25  # of the changes are another split and height, and the rest of one or two other fields or the height
BLOCKS_A_MULTIPROCESSOR = (0.5, 3.0)
FEW, PROMISING, PAIRS, COMPARED = 3, 0.9985, 3, 7
REPLAYS = 25


class Move(NamedTuple):
    """A change that is kept: the step's times with it and without."""

    product: str
    plan: Any  # of one family or the other
    us: float
    before_us: float


def family_for(num_tokens: int, width: int) -> tuple[ModuleType, ModuleType]:
    """The kernels of a step of so many tokens in a model of that width where memory is fast, and what plans them."""
    few = num_tokens <= skinny_linear.most_tokens(width, fast_memory=True)
    return (skinny_linear, skinny_plans) if few else (batch_linear, batch_plans)


def change(plan: Any, form: int, num_tokens: int, num_rows: int, num_sms: int, draw: random.Random) -> Any:
    """Another plan near this one, that gives a multiprocessor neither much too little nor much too much."""
    plans = skinny_plans if isinstance(plan, skinny_plans.Plan) else batch_plans
    heights = range(plans.min_tile_rows(num_tokens), plans.max_tile_rows(form, num_tokens) + 1, ROWS_MULTIPLE)
    choices = {field: values for field, values in CHOICES.items() if field in plan._fields} | {"tile_rows": heights}
    while True:
        if draw.random() < NEW_CUT:
            other = plan._replace(splits=draw.choice(plans.SPLITS), tile_rows=draw.choice(heights))
        else:
            other = plan
            for field in draw.sample(sorted(choices), draw.choice((1, 1, 2, 3))):
                other = other._replace(**{field: draw.choice(choices[field])})
        blocks = -(-num_rows // other.tile_rows) * other.splits
        least, most = (share * num_sms for share in BLOCKS_A_MULTIPROCESSOR)
        if other != plan and least <= blocks <= most and other.splits * ROWS_MULTIPLE <= other.tile_rows:
            return other


def improve(
    plans: Plans,
    propose: Callable[[Plans], tuple[str, Any]],
    measure: Callable[[Plans, int], float],
    has_time: Callable[[], bool],
) -> Iterator[Move]:
    """Better and better plans, a change at a time.

    measure: the step's time under these plans as a median of so many replays; infinite where one of them cannot run.
    """
    now = measure(plans, COMPARED)
    tried: set[tuple[tuple[str, Any], ...]] = set()
    while has_time():
        name, plan = propose(plans)
        others = plans | {name: plan}
        key = tuple(sorted(others.items()))
        if key in tried:
            continue
        tried.add(key)
        if measure(others, FEW) > now * PROMISING:
            continue
        pairs = [(measure(others, COMPARED), measure(plans, COMPARED)) for _ in range(PAIRS)]
        new_us, now = (statistics.median(times) for times in zip(*pairs, strict=True))
        if all(new < old for new, old in pairs):
            yield Move(name, plan, new_us, now)
            plans, now = others, new_us


def run(shape: str, num_tokens: int, context: int, others: list[int], seconds: float, seed: int) -> dict[str, Any]:
    step = Step(shape)
    family = family_for(num_tokens, step.config.hidden_size)[0]
    decode, own = step.decode(num_tokens, context), family.choose_plan
    products = {name: (FORMS[name], *size) for name, size in product_shapes(step.config).items()}
    device = step.weights.embed.device
    gpu = one_kernel.num_sms(device), one_kernel.has_fast_memory(device)

    def patched(plans: Plans) -> Any:
        chosen = {products[name]: plan for name, plan in plans.items()}

        def choose(form: int, num_tokens: int, num_rows: int, size: int, *gpu: Any) -> Any:
            return chosen.get((form, num_rows, size)) or own(form, num_tokens, num_rows, size, *gpu)

        return mock.patch.object(family, "choose_plan", choose)

    def measure(plans: Plans, repeats: int) -> float:
        with patched(plans):
            try:
                return median_microseconds([decode], repeats)
            except ValueError:  # no room for it, or too many splits
                return math.inf

    draw = random.Random(seed)

    def propose(plans: Plans) -> tuple[str, Any]:
        name = draw.choice(list(plans))
        return name, change(plans[name], FORMS[name], num_tokens, products[name][1], gpu[0], draw)

    everywhere = mock.patch.object(batch_linear, "FAST_MEMORY_TOKENS", batch_linear.MAX_TOKENS)
    families = tuple(dict.fromkeys((family, batch_linear)))  # which makes the head in any case
    with everywhere, mock.patch.object(linear, "ONE_KERNEL", families):
        first = {name: own(form, num_tokens, *size, *gpu) for name, (form, *size) in products.items()}
        plans, moves, end = first, [], time.monotonic() + seconds
        for move in improve(first, propose, measure, lambda: time.monotonic() < end):
            plans = plans | {move.product: move.plan}
            moves.append(move._asdict() | {"plan": move.plan._asdict()})
            print(f"{move.product:8} {move.before_us:7.1f} to {move.us:7.1f} us: {move.plan}", flush=True)
        rows = [compare(step, num_tokens, tokens, first, plans, patched) for tokens in (context, *others)]
    facts = {"shape": shape, "tokens": num_tokens, "context_len": context, "seed": seed, "seconds": seconds}
    named = {name: plan._asdict() for name, plan in plans.items()}
    return describe() | facts | {"plans": named, "moves": moves, "rows": rows}


def compare(
    step: Step, num_tokens: int, context: int, before: Plans, after: Plans, patched: Callable[[Plans], Any]
) -> dict[str, float]:
    """Both steps at one context, in turn."""
    decode = step.decode(num_tokens, context)
    graphs = []
    for plans in (before, after):
        with patched(plans):
            graphs.append(capture([decode]))
    rounds = [[replay_seconds(graph) * 1e6 for graph in graphs] for _ in range(REPLAYS)]
    before_us, us = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"context {context}: {before_us:.1f} to {us:.1f} us", flush=True)
    return {"context_len": context, "before_us": before_us, "us": us}


def table(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `plan_table` reads, from results by name on its GPU; of equal products the last one's plan."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    on_its_gpu = (results[name] for name in sorted(results) if results[name]["device"] == DEVICE)
    for result in on_its_gpu:
        config = shape_config(result["shape"])
        plans = family_for(result["tokens"], config.hidden_size)[1]
        for product, (num_rows, size) in product_shapes(config).items():
            key = plans.FAMILY, NAMES[FORMS[product]], plans.padded(result["tokens"]), num_rows, size
            names = dict(zip(("family", "form", "tokens", "num_rows", "size"), key, strict=True))
            found[key] = names | {"plan": result["plans"][product]}
    return [found[key] for key in sorted(found)]


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def written(rows: list[dict[str, Any]]) -> str:
    """A plan a line."""
    return "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help=f"write {TABLE.name} from the results in the tree")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=1184, help="at which plans are compared")
    parser.add_argument("--others", type=numbers, default=[184, 2104], help="contexts at which the result is measured")
    parser.add_argument("--seconds", type=float, default=60, help="to look for plans")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.table:
        TABLE.write_text(written(table(read_results())))
        return 0
    try:
        found = run(args.shape, args.tokens, args.context, args.others, args.seconds, args.seed)
    except UserError as error:
        print(f"benchmarks.product_plans: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        write_json(found, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
