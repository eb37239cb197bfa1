"""A small matrix of decode-attention launches for compute-sanitizer (not collected by pytest):

PYTHONPATH=.:tests python tests/sanitize_decode_attn.py --json results/decode_attn/sanitizer.json

runs itself under memcheck, racecheck and synccheck and writes what they said. Only our kernels are watched: racecheck
objects to the library's matrix products that the expected results come from.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from decode_attn_helpers import assert_close, make_case, truth

from llama3.ops import decode_attn as ops

TOOLS = ("memcheck", "racecheck", "synccheck")


def launch_all() -> int:
    launches = 0
    for version in ("tensor_core", "ring", "tma"):
        for heads in ((32, 8, 128), (3, 1, 64)):
            for paged, lengths in ((False, [1, 0, 64, 65, 700]), (True, [2000])):
                case = make_case(lengths, *heads, paged=paged)
                out = torch.empty_like(case.q)
                ops.decode_attn(case.q, case.k_cache, case.v_cache, case.lengths, **case.rows, out=out, version=version)
                torch.cuda.synchronize()
                assert_close(out, case, truth(case)[0])
                launches += 1
    for version in ("ring", "tma"):
        for head_dim in (64, 128):
            case = make_case([0, 63, 64, -1, 300, 0], 32, 8, head_dim, spare_blocks=1)
            qkv = torch.randn(6, 48 * head_dim, device="cuda").bfloat16()
            table = torch.randn(400, head_dim // 2, device="cuda")
            out = ops.rope_append_decode(
                qkv, table, table, case.k_cache, case.v_cache, case.lengths, **case.rows, version=version
            )
            assert torch.isfinite(out).all()
            launches += 1
    return launches


def run_tools() -> dict[str, dict]:
    """{tool: {"exit_code": ..., "said": its summary lines, and after a failure "first_lines"}}"""
    found = {}
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=decode_attn", sys.executable, __file__]
        result = subprocess.run(command, capture_output=True, text=True)
        lines = [line.lstrip("= ") for line in (result.stdout + result.stderr).splitlines()]
        said = [line for line in lines if "SUMMARY" in line or line.endswith("launches checked")]
        found[tool] = {"exit_code": result.returncode, "said": said}
        if result.returncode:
            found[tool]["first_lines"] = lines[:12]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="run under all of compute-sanitizer's tools and write this file")
    args = parser.parse_args()
    if args.json:
        found = run_tools()
        args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "tools": found}, indent=1) + "\n")
        print(json.dumps(found))
    else:
        print(f"{launch_all()} launches checked")


if __name__ == "__main__":
    main()
