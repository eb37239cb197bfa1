"""Experiment: weights and cache brought into L2 while a ring is full; whole steps, everything else as it is.

python -m benchmarks.reach_trials --shape 1b --tokens 64 --contexts 184,1184 --json OUT
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import product_plans
from benchmarks.decode_products import Step, numbers
from benchmarks.environment import describe
from benchmarks.graph_timing import median_microseconds
from benchmarks.json_file import write_json
from benchmarks.layer import product_shapes
from llama3.ops import batch_linear, decode_attn, skinny_linear
from llama3.ops.batch_linear import Plan
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU

REACHES, TRIGGERS, ATTENTION = (0, 8, 16, 32), (4, 8, 16), (0, 4, 8)
REPEATS = 7
HEIGHTS = (64, 80, 96, 112, 128)


@contextlib.contextmanager
def setting(reach: int, trigger: int | None, attention: int) -> Iterator[None]:
    """One setting for all products, and attention's; trigger None: as it is."""
    own = batch_linear.choose_plan

    def choose(*args: Any) -> Plan:
        plan = own(*args)
        return plan._replace(reach=reach, trigger=plan.trigger if trigger is None else trigger)

    with (
        mock.patch.object(batch_linear, "choose_plan", choose),
        mock.patch.object(skinny_linear, "REACH", reach),
        mock.patch.object(skinny_linear, "TRIGGER", 4 if trigger is None else trigger),
        mock.patch.object(decode_attn, "REACH", attention),
    ):
        yield


def trials(step: Step, tokens: int, context: int) -> list[dict[str, Any]]:
    decode = step.decode(tokens, context)
    expected = decode().clone()
    rows: list[dict[str, Any]] = []
    settings = [(0, None, 0), *itertools.product(REACHES, TRIGGERS, ATTENTION), (0, None, 0)]
    for reach, trigger, attention in settings:
        with setting(reach, trigger, attention):
            same = torch.equal(decode(), expected)
            us = median_microseconds([decode], REPEATS)
        rows.append({"tokens": tokens, "context": context, "reach": reach, "trigger": trigger, "attention": attention})
        rows[-1] |= {"us": us, "same": same}
    for row in sorted(rows, key=lambda row: row["us"])[:12] + rows[:1] + rows[-1:]:
        print(row, flush=True)
    return rows


def plans_for(form: int, num_rows: int) -> list[Plan]:
    heights = (128, 256) if form == NORM_SWIGLU else HEIGHTS
    triggers, reaches = (0, 4, 8, 16), (0, 16)
    found = [
        Plan(splits, 106 << 10, trigger, rows, ahead, reach)
        for splits, trigger, rows, ahead, reach in itertools.product(
            (1, 2) if form == NORM_SWIGLU else (2, 4, 8), triggers, heights, (4, batch_linear.MAX_STAGES), reaches
        )
    ]
    return found


def search_plans(step: Step, tokens: int, context: int, attention: int) -> list[dict[str, Any]]:
    forms = {"qkv": NORM_LINEAR, "o": LINEAR_ADD, "gate-up": NORM_SWIGLU, "down": LINEAR_ADD}
    products = {name: (forms[name], *size) for name, size in product_shapes(step.config).items()}
    decode, own = step.decode(tokens, context), batch_linear.choose_plan

    def measure(plans: Any) -> float | None:
        chosen = {products[name]: plan for name, plan in plans.items()}

        def choose(form: int, num_tokens: int, num_rows: int, size: int, *gpu: Any) -> Plan:
            return chosen.get((form, num_rows, size)) or own(form, num_tokens, num_rows, size, *gpu)

        with (
            mock.patch.object(batch_linear, "choose_plan", choose),
            mock.patch.object(decode_attn, "REACH", attention),
        ):
            try:
                return median_microseconds([decode], 5)
            except ValueError:
                return None

    print("as it is", measure({}), flush=True)
    plans = {name: plans_for(*products[name][:2]) for name in ("o", "down", "gate-up", "qkv")}
    found = product_plans.search(plans, measure)
    rows = []
    for name, times in found.items():
        rows += [{"product": name, "plan": plan._asdict(), "us": us} for plan, us in times.items()]
        for plan, us in itertools.islice(times.items(), 6):
            print(name, f"{us:.1f}", tuple(plan), flush=True)
    print("as it is", measure({}), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--tokens", type=numbers, default=[64])
    parser.add_argument("--contexts", type=numbers, default=[184, 1184])
    parser.add_argument("--plans", type=int, help="search plans too, at this context")
    parser.add_argument("--attention", type=int, default=0, help="attention's reach meanwhile")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    step = Step(args.shape)
    rows = [row for tokens in args.tokens for context in args.contexts for row in trials(step, tokens, context)]
    result = describe() | {"shape": args.shape, "rows": rows}
    write_json(result, args.json)
    if args.plans is not None:
        result["plans"] = search_plans(step, args.tokens[0], args.plans, args.attention)
        write_json(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
