"""The table of the op benchmark, its words when it cannot run, and the search for the products' plans."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import ops, product_plans
from benchmarks.layer import product_shapes
from llama3.ops import batch_linear
from llama3.ops.one_kernel import LINEAR_ADD, NORM_SWIGLU
from llama3.shapes import shape_config
from llama3.weights import random_weights

ROOT = Path(ops.__file__).parent.parent


def test_floor_is_the_larger_of_bytes_and_flops() -> None:
    memory = {"model": "1b", "op": "o", "tokens": 1, "us": 4.0, "bytes": 8_000_000, "flops": 1_000_000}
    matrix = {"model": "8b", "op": "down", "tokens": 4096, "us": 50.0, "bytes": 1, "flops": 20_000_000_000}
    text = ops.table({"read_bandwidth": 4e12, "matrix_flops": 800e12, "rows": [memory, matrix]})
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:])
    assert first == ["1b", "o", "1", "4.0", "2.0", "50%", "2000", "0"]
    assert second == ["8b", "down", "4096", "50.0", "25.0", "50%", "0", "400"]


def test_results_in_the_tree_make_a_table() -> None:
    for path in sorted((ROOT / "results/ops").glob("*.json")):
        results = json.loads(path.read_text())
        assert len(ops.table(results).splitlines()) == len(results["rows"]) + 2


def test_no_gpu_is_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.ops", "--shape", "1b"]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    )
    assert run.returncode == 2 and run.stderr.startswith("benchmarks.ops: ") and run.stderr.count("\n") == 1


def test_the_best_plan_of_each_product_is_kept_for_the_next_one() -> None:
    few, many, impossible = (product_plans.Plan(splits) for splits in (1, 4, 8))
    cost = {"qkv": {few: 5.0, many: 3.0}, "o": {few: 1.0, many: 2.0}}

    def measure(plans: Mapping[str, product_plans.Plan]) -> float | None:
        if impossible in plans.values() or "down" in plans:
            return None
        return sum(cost[name][plans.get(name, few)] for name in cost)

    plans = (few, impossible, many)
    found = product_plans.search({"qkv": plans, "down": plans, "o": plans}, measure)
    assert found == {"qkv": {many: 4.0, few: 6.0}, "o": {few: 4.0, many: 5.0}}
    assert [list(times) for times in found.values()] == [[many, few], [few, many]]


def test_plans_that_are_tried_hold_the_one_that_is_chosen() -> None:
    for form, *shape in ((LINEAR_ADD, 4096, 14336), (NORM_SWIGLU, 28672, 4096)):
        chosen = batch_linear.choose_plan(form, 64, *shape, 132, fast_memory=True)
        assert chosen in product_plans.plans_for(form, shape[0], 64)
    assert {plan.tile_rows for plan in product_plans.plans_for(NORM_SWIGLU, 28672, 65)} <= set(range(64, 129))


def test_the_products_of_a_layer_are_those_of_its_weights() -> None:
    config = shape_config("tiny")
    layer = random_weights(config, "cpu", torch.bfloat16).layers[0]
    shapes = {tuple(weight.shape) for weight in vars(layer).values() if weight.dim() == 2}
    assert set(product_shapes(config).values()) == shapes
    assert product_plans.FORMS.keys() == product_shapes(config).keys() == set(product_plans.ORDER)
