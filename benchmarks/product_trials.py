"""Trials of batch_linear's experiments in whole decode steps.

python -m benchmarks.product_trials 8b 64
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from benchmarks.decode_products import REPEATS, Step
from benchmarks.graph_timing import median_microseconds
from benchmarks.layer import product_shapes
from benchmarks.product_plans import FORMS
from llama3.ops import batch_linear, one_kernel
from llama3.ops.batch_linear import Plan

KIB = 1 << 10


@contextmanager
def plans(step: Step, chosen: dict[tuple[int, int, int], Plan]) -> Iterator[None]:
    own = batch_linear.choose_plan

    def choose(form: int, num_tokens: int, num_rows: int, size: int, *gpu: object) -> Plan:
        return chosen.get((form, num_rows, size)) or own(form, num_tokens, num_rows, size, *gpu)

    with mock.patch.object(batch_linear, "choose_plan", choose):
        yield


def main() -> None:
    step, num_tokens = Step(sys.argv[1]), int(sys.argv[2])
    decode = step.decode(num_tokens, 128)
    shapes = {name: (FORMS[name], *shape) for name, shape in product_shapes(step.config).items()}
    head = (one_kernel.NORM_LINEAR, step.config.vocab_size, step.config.hidden_size)
    layers = step.weights.layers
    for i, layer in enumerate(layers):
        batch_linear.successors[layer.qkv.data_ptr()] = layer.o
        batch_linear.successors[layer.o.data_ptr()] = layer.gate_up
        batch_linear.successors[layer.gate_up.data_ptr()] = layer.down
        if i + 1 < len(layers):
            batch_linear.successors[layer.down.data_ptr()] = layers[i + 1].qkv
    two_blocks = {shapes["gate-up"]: Plan(1, 112 * KIB, 4, 112)}
    trials: list[tuple[str, int, dict[tuple[int, int, int], Plan], bool]] = [
        ("as chosen", 0, {}, False),
        *((f"{kib} KB of what follows to L2", kib, {}, False) for kib in (16, 32, 64, 96, 128)),
        ("gate-up: two blocks a multiprocessor", 0, two_blocks, False),
        ("the same, all asked for early", 0, {k: p._replace(ahead=14) for k, p in two_blocks.items()}, False),
        ("the same, two stages asked for early", 0, {k: p._replace(ahead=2) for k, p in two_blocks.items()}, False),
        ("head here, a block a multiprocessor", 0, {head: Plan(1, 200 * KIB, 0, 128)}, True),
        ("head here, two blocks a multiprocessor", 0, {head: Plan(1, 106 * KIB, 2, 128)}, True),
        ("as chosen", 0, {}, False),
    ]
    for name, kib, chosen, with_head in trials:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(batch_linear, "UPCOMING_BYTES", kib * KIB))
            stack.enter_context(plans(step, chosen))
            if with_head:
                stack.enter_context(mock.patch.object(one_kernel, "HEAD_ELEMENTS", 1 << 40))
            try:
                print(f"{name}: {median_microseconds([decode], REPEATS):.0f}", flush=True)
            except (ValueError, RuntimeError) as error:
                print(f"{name}: {error}", flush=True)


if __name__ == "__main__":
    main()
