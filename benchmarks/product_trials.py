"""Trials of batch_linear in whole decode steps, each in a burst and for a second under load.

    python -m benchmarks.product_trials [8b]

The last figure of a line says how far the logits are from those of the first plan of its case.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from benchmarks.decode_products import Step
from benchmarks.layer import product_shapes
from benchmarks.sustained import GpuLog, measure
from llama3.ops import batch_linear, gemm, gemm_search, linear
from llama3.ops.batch_linear import Plan

KIB = 1 << 10
Chosen = dict[str, Plan]

SHARE: Chosen = {"gate-up": Plan(1, 200 * KIB, 0, 224, 2, share=2)}
SHARE_4: Chosen = {"gate-up": Plan(1, 200 * KIB, 0, 224, 4, share=2)}
DOWN: Chosen = {"down": Plan(4, 200 * KIB, 0, 144)}
DOWN_150: Chosen = {"down": Plan(4, 150 * KIB, 0, 144)}
ATTN_OUT: Chosen = {"o": Plan(4, 200 * KIB, 0, 144)}
QKV: Chosen = {"qkv": Plan(4, 200 * KIB, 0, 208, 2)}
BASE: Chosen = {}
TRIALS = {"base": BASE, "share": SHARE, "share, 4 ahead": SHARE_4, "down 4 x 144": DOWN, "with 150 KB": DOWN_150}
TRIALS |= {"o 4 x 144": ATTN_OUT, "qkv 4 x 208": QKV, "share and down": SHARE | DOWN, "all": SHARE | DOWN | ATTN_OUT | QKV}
TRIALS |= {"base again": BASE}


@contextmanager
def plans(step: Step, chosen: Chosen) -> Iterator[None]:
    own, shapes = batch_linear.choose_plan, product_shapes(step.config)
    by_shape = {shapes[name]: plan for name, plan in chosen.items()}

    def choose(form: int, num_tokens: int, num_rows: int, size: int, *gpu: int) -> Plan:
        return by_shape.get((num_rows, size)) or own(form, num_tokens, num_rows, size, *gpu)

    with mock.patch.object(batch_linear, "choose_plan", choose):
        yield


@contextmanager
def few_tokens_too(counts: tuple[int, ...]) -> Iterator[None]:
    """batch_linear alone, in kernels for these counts of tokens."""
    with (
        mock.patch.object(linear, "ONE_KERNEL", (batch_linear,)),
        mock.patch.object(batch_linear, "MIN_TOKENS", 1),
        mock.patch.object(batch_linear, "TOKEN_COUNTS", counts),
    ):
        batch_linear.choose_plan.cache_clear()
        yield
    batch_linear.choose_plan.cache_clear()


def report(name: str, decode: Callable[[], torch.Tensor], log: GpuLog, first: torch.Tensor | None) -> torch.Tensor:
    torch.cuda.synchronize()
    try:
        logits = decode().float()
        torch.cuda.synchronize()
        found = measure(decode, log, 1.0)
    except (ValueError, RuntimeError) as error:
        print(f"{name}: {error}", flush=True)
        return torch.empty(0) if first is None else first
    first = logits if first is None else first
    apart = ((logits - first).norm() / first.norm()).item()
    times = f"{found['burst_us']:.0f} {found['sustained_us']:.0f}"
    print(f"{name}: {times}, {found['clock_mhz']} MHz, {found['watts']} W, {apart:.4f}", flush=True)
    return first


def main() -> None:
    step = Step(sys.argv[1] if len(sys.argv) > 1 else "8b")
    with GpuLog() as log:
        for case in ((64, 128), (64, 1152)):
            decode, first = step.decode(*case), None
            for name, chosen in TRIALS.items():
                with plans(step, chosen):
                    first = report(f"{case} {name}", decode, log, first)
            del decode
            torch.cuda.empty_cache()
        decode, first = step.decode(256, 192), None
        for ahead in (8, 1, 2, 3, 8):
            with mock.patch.object(gemm, "AHEAD", ahead):
                first = report(f"(256, 192), stages asked for early: {ahead}", decode, log, first)
        for (product, kind), plan in gemm_search._fused.items():
            print(f"  {kind}, {product.num_rows} x {product.size}: {plan}")
        del decode
        torch.cuda.empty_cache()
        counts = batch_linear.TOKEN_COUNTS
        for case in ((16, 128), (16, 3072), (8, 128)):
            decode = step.decode(*case)
            first = report(f"{case} skinny", decode, log, None)
            with few_tokens_too(counts[1:]):
                report(f"{case} in kernels for 32", decode, log, first)
            with few_tokens_too(counts):
                report(f"{case} in kernels for 16", decode, log, first)
                with plans(step, SHARE):
                    report(f"{case} in kernels for 16, share", decode, log, first)
            report(f"{case} skinny", decode, log, first)
            del decode
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
