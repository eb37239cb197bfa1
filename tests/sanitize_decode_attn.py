"""A small matrix of decode-attention launches for compute-sanitizer (not collected by pytest):

PYTHONPATH=.:tests python tests/sanitize_decode_attn.py --json results/decode_attn/sanitizer.json

runs its parts one by one under memcheck, racecheck and synccheck and writes what they said. Only our kernels are
watched, and the expected results come from the CPU: the library's matrix products do not survive racecheck.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from decode_attn_helpers import Case, assert_close, make_case, truth

from benchmarks.json_file import write_json
from llama3.ops import decode_attn as ops

TOOLS = ("memcheck", "racecheck", "synccheck")
PARTS = tuple(product(("tensor_core", "ring", "tma"), (64, 128)))  # versions and head sizes
TIMEOUT_S = 240


def on_cpu(case: Case) -> Case:
    tensors = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in vars(case).items()}
    return Case(**tensors)


def launch_part(version: str, head_dim: int) -> int:
    """Launches and checks the cases of one part; returns how many there were."""
    launches = 0
    heads = (32, 8, 128) if head_dim == 128 else (3, 1, 64)
    for paged, lengths in ((False, [1, 0, 64, 65, 700]), (True, [2000])):
        case = make_case(lengths, *heads, paged=paged)
        out = torch.empty_like(case.q)
        ops.decode_attn(case.q, case.k_cache, case.v_cache, case.lengths, **case.rows, out=out, version=version)
        torch.cuda.synchronize()
        case = on_cpu(case)
        assert_close(out.cpu(), case, truth(case)[0])
        launches += 1
    if version != "tensor_core":  # it has no fused form
        case = make_case([0, 63, 64, -1, 300, 0], 32, 8, head_dim, spare_blocks=1)
        qkv = torch.randn(6, 48 * head_dim, device="cuda").bfloat16()
        table = torch.randn(400, head_dim // 2, device="cuda")
        out = ops.rope_append_decode(
            qkv, table, table, case.k_cache, case.v_cache, case.lengths, **case.rows, version=version
        )
        assert torch.isfinite(out).all()
        launches += 1
    return launches


def run_tool(tool: str, version: str, head_dim: int) -> dict:
    """What a tool said about one part: "exit_code", "said" (its summary), and after a failure "first_lines"."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=decode_attn", sys.executable, __file__]
    command += ["--part", version, str(head_dim)]
    part: dict[str, Any] = {"tool": tool, "version": version, "head_dim": head_dim}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return part | {"exit_code": None, "said": [f"still running after {TIMEOUT_S} s"]}
    lines = [line.lstrip("= ") for line in (result.stdout + result.stderr).splitlines()]
    found = part | {"exit_code": result.returncode}
    found["said"] = said = [line for line in lines if "SUMMARY" in line or line.endswith("launches checked")]
    if result.returncode or not all(" 0 " in line for line in said if "SUMMARY" in line):
        found["first_lines"] = lines[:24]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs=2, metavar=("VERSION", "HEAD_DIM"), help="only launch this part, under no tool")
    parser.add_argument("--json", type=Path, help="run under all of compute-sanitizer's tools and write this file")
    parser.add_argument("--tools", default=",".join(TOOLS), help="comma-separated; default: all")
    parser.add_argument("--at-once", type=int, default=1, help="processes at a time")
    args = parser.parse_args()
    if args.part:
        print(f"{launch_part(args.part[0], int(args.part[1]))} launches checked")
    elif args.json:
        jobs = [(tool, *part) for tool in args.tools.split(",") for part in PARTS]
        with ThreadPoolExecutor(args.at_once) as pool:
            found = list(pool.map(lambda job: run_tool(*job), jobs))
        write_json({"gpu": torch.cuda.get_device_name(), "runs": found}, args.json)
        print(json.dumps(found))
    else:
        print(f"{sum(launch_part(*part) for part in PARTS)} launches checked")


if __name__ == "__main__":
    main()
