"""Whole-model throughput: one case or a suite of them, on this engine, vLLM and transformers.

    python benchmark_model.py --model_name MODEL --max_gen_batch_size=1 --max_gen_len=128 --input_len=128
    python benchmark_model.py --model_name MODEL --use_vllm_impl           the same case on vLLM
    python benchmark_model.py --shape 1b --engines ours,vllm,hf --suite seed --json results/model/seed-1b.json

Prompts are random tokens, fresh for every run; every sequence generates its full length. Each engine runs in a process
of its own; vLLM and transformers are needed only where they are asked for. See docs/benchmarks.md.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import SAMPLING_CHOICES, SUITES, Case, parse_cases, samplings
from benchmarks.engines import DEFAULT_MODES, select_modes
from benchmarks.run import execute
from llama3.cli import DEMO_MODEL, dashed_aliases, run_main
from llama3.errors import RequestError
from llama3.shapes import SHAPES

# How tokens are drawn where --sampling does not say; None is a single case.
DEFAULT_SAMPLING = {"seed": "both", "profile": "greedy", None: "mission"}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model_name", default=str(DEMO_MODEL), help="local folder or hub name (default: %(default)s)")
    model.add_argument("--shape", choices=sorted(SHAPES), help="this shape with random weights, in place of a model")
    model.add_argument("--dtype", default="auto", help="auto (the folder's), bfloat16, float16 or float32")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    model.add_argument("--kernels", default="auto", help="auto, reference or cuda (this engine only)")
    cases = parser.add_argument_group("what is measured")
    cases.add_argument("--max_gen_batch_size", type=int, default=1, help="sequences at once (default: %(default)s)")
    cases.add_argument("--max_gen_len", type=int, default=128, help="tokens to generate (default: %(default)s)")
    cases.add_argument("--input_len", type=int, default=128, help="tokens of each prompt (default: %(default)s)")
    cases.add_argument("--random_seed", type=int, default=0, help="of weights and prompts (default: %(default)s)")
    cases.add_argument("--suite", choices=sorted(SUITES), help="the cases of a suite in place of one")
    cases.add_argument("--scenarios", help="cases as JSON, or a file of it: '[[batch, input, output], ...]'")
    cases.add_argument("--sampling", choices=SAMPLING_CHOICES, help="mission is temperature 0.6 and top-p 0.9")
    cases.add_argument("--repeats", type=int, default=3, help="of which the median counts (default: %(default)s)")
    cases.add_argument("--time_budget", type=float, help="seconds; drops repetitions, never cases, and says so")
    cases.add_argument("--startup", action="store_true", help="instead: process start to first token")
    cases.add_argument("--profile", metavar="TRACE", help="instead: trace decode (.json, .json.gz), time per op")
    engines = parser.add_argument_group("engines")
    engines.add_argument("--engines", help="by comma: ours, vllm, hf, or single modes such as hf-static")
    engines.add_argument("--use_vllm_impl", action="store_true", help="vLLM in place of this engine")
    engines.add_argument("--use_hf_impl", action="store_true", help="transformers in place of this engine")
    for family in DEFAULT_MODES:
        engines.add_argument(f"--{family}_options", type=_options, default={}, help="its keyword arguments, as JSON")
    engines.add_argument("--timeout", type=float, default=900.0, help="seconds a worker may take for one command")
    peaks = parser.add_argument_group("peaks, by which fractions are given (default: known for some GPUs)")
    peaks.add_argument("--matrix_peak", type=float, help="FLOP/s of a large bf16 matrix product")
    peaks.add_argument("--read_bandwidth", type=float, help="bytes/s of a streaming read")
    peaks.add_argument("--measure_peaks", action="store_true", help="measure both first")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, help="results, rewritten after every case")
    output.add_argument("--append", action="store_true", help="add to the results in --json (same model, same GPU)")
    output.add_argument("--csv", type=Path, help="results as a table, a row a measurement")
    output.add_argument("--plot", type=Path, help="a PNG of the throughputs; one more for a second way of sampling")
    output.add_argument("--hardware_csv", type=Path, help="other hardware, as columns of the boxed tables")
    output.add_argument("--log_folder", type=Path, help="keep each engine's own output there")
    args = parser.parse_args(dashed_aliases(argv))
    _complete(args)
    return args


def _complete(args: argparse.Namespace) -> None:
    """Derive `modes`, `cases` and `sampling_list`; raises RequestError where flags contradict each other."""
    if args.suite and args.scenarios:
        raise RequestError("--suite and --scenarios both say what to measure: give one of them")
    if args.engines and (args.use_vllm_impl or args.use_hf_impl):
        raise RequestError("--engines and --use_..._impl both say which engine to measure: give one of them")
    if args.repeats < 1:
        raise RequestError(f"--repeats is {args.repeats}; it must be at least 1")
    if args.startup and args.profile:
        raise RequestError("--startup and --profile are measurements of their own: run one after the other")
    if args.append and args.json is None:
        raise RequestError("--append adds to the file that --json names: give both")
    single = [name for name, wanted in (("vllm", args.use_vllm_impl), ("hf", args.use_hf_impl)) if wanted]
    names = args.engines.split(",") if args.engines else single or ["ours"]
    args.modes = select_modes([name.strip() for name in names])
    args.cases = (Case(args.max_gen_batch_size, args.input_len, args.max_gen_len),)
    if args.suite:
        args.cases = SUITES[args.suite]
    elif args.scenarios:
        args.cases = parse_cases(args.scenarios)
    args.is_single = not (args.suite or args.scenarios)
    args.sampling_list = samplings(args.sampling or DEFAULT_SAMPLING[args.suite])


def _options(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"{text} is no JSON object")
    return values


def main(argv: list[str]) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a run that is stopped has printed its lines
    record = execute(parse_args(argv))
    if record.measurements and not any(m.metrics for m in record.measurements):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
