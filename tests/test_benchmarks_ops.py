"""The table of the op benchmark, and its words when it cannot run."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import ops, product_plans
from benchmarks.layer import product_shapes
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


def test_the_products_of_a_layer_are_those_of_its_weights() -> None:
    config = shape_config("tiny")
    layer = random_weights(config, "cpu", torch.bfloat16).layers[0]
    shapes = {tuple(weight.shape) for weight in vars(layer).values() if weight.dim() == 2}
    assert set(product_shapes(config).values()) == shapes
    assert product_plans.FORMS.keys() == product_shapes(config).keys()
