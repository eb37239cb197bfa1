"""Measured figures as the documents show them: a provider for every set of result files.

For a new set, write a module beside these and add a line to PROVIDERS; then a document may hold its sections.
"""

from benchmarks.record import Record
from tools.figures import (
    decode_attn,
    decode_step,
    demo_model,
    experiments,
    gpu_checks,
    model,
    observations,
    ops,
    performance,
    sampling,
)
from tools.figures.provider import Provider

PROVIDERS = (
    Provider("results/model/*.json", model.sections, model.plots, Record.load),
    Provider("results/other_runs/*.json", model.other_runs, load=Record.load),
    Provider("results/decode_attn/*.json", decode_attn.sections, decode_attn.plots),
    Provider("results/decode_step/*.json", decode_step.sections),
    Provider("results/ops/*.json", ops.sections),
    Provider("results/decode_products/*.json", ops.few_tokens),
    Provider("results/product_plans/*.json", ops.plans),
    Provider("results/gemm/*.json", ops.many_tokens),
    Provider("results/sampling/*.json", sampling.sections),
    Provider("results/experiments/*.json", experiments.sections),
    Provider("results/observations/*.json", observations.sections),
    Provider("results/performance/*.json", performance.sections),
    Provider("results/sustained/*.json", performance.sustained),
    Provider("results/gpu_checks.json", gpu_checks.sections),
    Provider("models/demo/training.json", demo_model.sections),
)
