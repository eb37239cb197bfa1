#!/usr/bin/env python3
"""Bandwidth of the decode-attention kernel: one shape, or the whole matrix beside FA2, FA3 and FlashInfer.

    python benchmark_kernel.py --head_size 64 --q_num_heads 32 --kv_num_heads 8 --batch_size 1 --seq_n 256
    python benchmark_kernel.py --suite --json results/decode_attn/suite.json --plot build/bandwidth.png
    python benchmark_kernel.py --suite ladder --json results/decode_attn/ladder.json
    ncu --profile-from-start off --clock-control none --cache-control all --csv \\
        --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed \\
        python benchmark_kernel.py --use_ncu --batch_size 64 --seq_n 4096 | python tools/ncu_table.py

Needs a CUDA GPU. Every result is compared with fp32 before it is timed; how times are taken: tools/decode_bench.py.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch

import load_custom_kernels
from benchmarks.environment import gpu_state
from benchmarks.json_file import write_json
from benchmarks.plot_file import check_path
from llama3.errors import UserError
from llama3.ops import decode_attn as ops
from tools import decode_bench as bench
from tools import plot_bandwidth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head_size", type=int, default=128, choices=ops.HEAD_DIMS)
    parser.add_argument("--q_num_heads", type=int, default=32)
    parser.add_argument("--kv_num_heads", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--seq_n", type=int, default=2048, help="tokens in the cache of each sequence")
    parser.add_argument("--warmup_steps", type=int, default=50)
    parser.add_argument("--run_steps", type=int, default=200)
    parser.add_argument(
        "--dont_flush_gpu_cache", action="store_true", help="one cache all the time, so that it may stay in L2"
    )
    parser.add_argument(
        "--use_pytorch_kernel", action="store_true", help="FlashAttention 2 as PyTorch ships it, instead of ours"
    )
    parser.add_argument("--use_ncu", action="store_true", help="run under ncu: launch run_steps times, let ncu measure")
    parser.add_argument(
        "--version", choices=ops.VERSIONS, help="a step of the ladder (default: the fastest for this GPU)"
    )
    parser.add_argument(
        "--suite", nargs="?", const="full", choices=("full", "ladder"), help="the matrix, or the ladder's steps"
    )
    parser.add_argument("--no_peers", action="store_true", help="in the suite: only our kernels")
    parser.add_argument("--json", type=Path, help="write the suite's results here")
    parser.add_argument("--plot", type=Path, help="draw bandwidth against context from the suite's results")
    args = parser.parse_args()
    try:
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA GPU here (torch.cuda.is_available() is false); the benchmark needs one")
        if args.suite == "ladder" and args.plot is not None:
            raise UserError("--plot shows bandwidth against context, which the ladder does not hold")
        if args.plot is not None:
            check_path(args.plot)
        if args.suite:
            run_suite(args)
        else:
            run_single(args)
    except (UserError, load_custom_kernels.KernelBuildError) as error:
        print(f"benchmark_kernel.py: {error}", file=sys.stderr)
        return 2
    return 0


def run_single(args: argparse.Namespace) -> None:
    shape = bench.Shape(args.q_num_heads, args.kv_num_heads, args.head_size, args.batch_size, args.seq_n)
    if args.use_pytorch_kernel and shape.context % ops.BLOCK_SIZE:
        raise UserError(f"--seq_n {shape.context}: with --use_pytorch_kernel it must be a multiple of {ops.BLOCK_SIZE}")
    inputs = bench.Inputs(shape, bench.copies_for(shape, rotate=not args.dont_flush_gpu_cache))
    calls = bench.fa2(inputs) if args.use_pytorch_kernel else bench.ours(inputs, version=args.version)
    name = "FA2" if args.use_pytorch_kernel else "decode_attn"
    error = check(shape, name, calls[0](), inputs.truth(blocked=not args.use_pytorch_kernel))
    print(f"shape: {shape.label} (query/kv heads, head size: batch x context), bfloat16")
    print(f"relative error against fp32: {error:.2e}")
    print(
        f"KV size: {shape.kv_bytes / 1e6:.2f} MB, "
        f"floor at {bench.READ_CEILING / 1e12:.3f} TB/s: {_floor(shape) * 1e6:.2f} us"
    )
    if args.use_ncu:
        profile(calls, args.warmup_steps, args.run_steps)
        return
    steps = (calls * -(-args.run_steps // len(calls)))[: max(args.run_steps, len(calls))]
    replays = max(3, args.warmup_steps // len(steps))
    seconds = bench.time_together({"kernel": steps}, replays=max(5, replays))["kernel"]
    print(
        f"duration: {seconds['median'] * 1e6:.2f} us (p10 {seconds['p10'] * 1e6:.2f}, p90 {seconds['p90'] * 1e6:.2f})"
    )
    rate = shape.kv_bytes / seconds["median"]
    print(f"bandwidth: {rate / 1e9:.0f} GB/s, {rate / bench.READ_CEILING:.1%} of the ceiling")


def profile(calls: list[bench.Call], warmup_steps: int, run_steps: int) -> None:
    """Plain launches between cudaProfilerStart and Stop, for `ncu --profile-from-start off`."""
    for step in range(warmup_steps):
        calls[step % len(calls)]()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for step in range(run_steps):
        calls[step % len(calls)]()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def check(shape: bench.Shape, name: str, out: torch.Tensor, truth: torch.Tensor) -> float:
    error = bench.relative_error(out, truth)
    if not error <= bench.MAX_ERROR:
        raise RuntimeError(f"{name} is wrong at {shape.label}: relative error {error:.2e} against fp32")
    return error


def _floor(shape: bench.Shape) -> float:
    return shape.kv_bytes / bench.READ_CEILING


def run_suite(args: argparse.Namespace) -> None:
    ladder = args.suite == "ladder"
    peers = {} if args.no_peers or ladder else bench.importable_peers()
    rows = []
    for shape in bench.LADDER if ladder else bench.SUITE:
        row = measure(shape, peers, ladder)
        print(describe(row), flush=True)
        rows.append(row)
        torch.cuda.empty_cache()
    document = {
        "environment": environment(),
        "read_ceiling_TBs": bench.READ_CEILING / 1e12,
        "suite": args.suite,
        "rows": rows,
    }
    if args.json:
        write_json(document, args.json)
    if args.plot:
        plot_bandwidth.draw(plot_bandwidth.plot_data(document), args.plot)


def measure(shape: bench.Shape, peers: dict, ladder: bool) -> dict:
    """All kernels on one shape: {"us": {name: ...}, "error": {name: ...}, ...}."""
    inputs = bench.Inputs(shape, bench.copies_for(shape))
    kernels, skipped = {}, {}
    if ladder:
        kernels = {version: bench.ours(inputs, version=version, pdl=False) for version in ops.VERSIONS}
    else:
        kernels["ours"] = bench.ours(inputs)
        kernels["ours, launched alone"] = bench.ours(inputs, pdl=False)
        if not shape.ragged:
            kernels["ours, block table"] = bench.ours(inputs, rows={"block_table": inputs.table})
    mine = list(kernels)
    for name, make in peers.items():
        if name == "fa2" and shape.ragged:
            continue
        try:
            kernels[name] = make(inputs)
            kernels[name][0]()
        except Exception as error:  # a peer that cannot run a shape is a result, not a failure
            skipped[name] = repr(error)[:200]
            kernels.pop(name, None)
    truths = {blocked: inputs.truth(blocked) for blocked in ({True, False} if len(kernels) > len(mine) else {True})}
    errors = {name: bench.relative_error(calls[0](), truths[name in mine]) for name, calls in kernels.items()}
    for name in mine:
        check(shape, name, kernels[name][0](), truths[True])
    if not ladder:
        kernels["ours, fused"] = bench.fused(inputs)
    seconds = bench.time_together(kernels)
    fraction = _floor(shape) / seconds[mine[-1] if ladder else "ours"]["median"]
    return {
        "label": shape.label,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "batch": len(shape.lengths),
        "context": shape.context,
        "ragged": bool(shape.ragged),
        "kv_MB": shape.kv_bytes / 1e6,
        "floor_us": _floor(shape) * 1e6,
        "fraction_of_ceiling": fraction,
        "us": {name: round(times["median"] * 1e6, 3) for name, times in seconds.items()},
        "us_p10": {name: round(times["p10"] * 1e6, 3) for name, times in seconds.items()},
        "us_p90": {name: round(times["p90"] * 1e6, 3) for name, times in seconds.items()},
        "error": errors,
        "skipped": skipped,
    }


def describe(row: dict) -> str:
    times = "  ".join(f"{name} {us:.2f}" for name, us in row["us"].items())
    share = f"({row['fraction_of_ceiling']:.1%})"
    return f"{row['label']:34} {row['kv_MB']:7.1f} MB  floor {row['floor_us']:7.2f}  {times} us  {share}"


def environment() -> dict:
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    for name in ("vllm", "flashinfer"):
        module = sys.modules.get(name)
        if module:
            versions[name] = getattr(module, "__version__", "unknown")
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name, "multiprocessors": properties.multi_processor_count, "versions": versions,
        "gpu_after": gpu_state(), "command": " ".join(sys.argv),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
