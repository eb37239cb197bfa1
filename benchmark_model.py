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
from typing import Any, NamedTuple

from benchmarks.cases import SAMPLING_CHOICES, SUITES, Case, Sampling, parse_cases, samplings
from benchmarks.engines import DEFAULT_MODES, MODES, select_modes
from benchmarks.plot_file import check_path
from benchmarks.run import NothingMeasured, execute
from llama3.cli import DEMO_MODEL, dashed_aliases, run_main
from llama3.errors import RequestError
from llama3.shapes import SHAPES

_SUITE_NAMES = ", ".join(SUITES)
# How tokens are drawn where --sampling does not say.
DEFAULT_SAMPLING = {"seed": "both", "profile": "greedy", "scenarios": "mission", "single": "mission"}


class ChosenSuite(NamedTuple):
    """What one file of results is to hold. name: of SUITES, or "scenarios" or "single"."""

    name: str
    cases: tuple[Case, ...]
    samplings: tuple[Sampling, ...]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model_name", default=str(DEMO_MODEL), help="local folder or hub name (default: %(default)s)")
    model.add_argument("--shape", choices=sorted(SHAPES), help="this shape with random weights, in place of a model")
    model.add_argument("--dtype", default="auto", help="auto (the folder's), bfloat16, float16 or float32")
    model.add_argument("--device", default="auto", help="auto, cpu or cuda (the first that is visible)")
    model.add_argument("--kernels", default="auto", help="auto, reference or cuda (this engine only)")
    cases = parser.add_argument_group("what is measured")
    cases.add_argument("--max_gen_batch_size", type=int, default=1, help="sequences at once (default: %(default)s)")
    cases.add_argument("--max_gen_len", type=int, default=128, help="tokens to generate (default: %(default)s)")
    cases.add_argument("--input_len", type=int, default=128, help="tokens of each prompt (default: %(default)s)")
    cases.add_argument("--random_seed", type=int, default=0, help="of weights and prompts (default: %(default)s)")
    cases.add_argument("--suite", help=f"the cases of a suite in place of one, or of several by comma: {_SUITE_NAMES}")
    cases.add_argument("--scenarios", help="cases as JSON, or a file of it: '[[batch, input, output], ...]'")
    cases.add_argument("--sampling", choices=SAMPLING_CHOICES, help="mission is temperature 0.6 and top-p 0.9")
    cases.add_argument("--repeats", type=int, default=3, help="of which the median counts (default: %(default)s)")
    cases.add_argument("--time_budget", type=float, help="seconds; drops repetitions of the longest cases first")
    cases.add_argument("--startup", action="store_true", help="instead: process start to first token")
    cases.add_argument("--profile", metavar="TRACE", help="instead: trace decode (.json, .json.gz), time per op")
    engines = parser.add_argument_group("engines")
    engines.add_argument("--engines", help="by comma: ours, vllm, hf, or single modes such as hf-static")
    engines.add_argument("--use_vllm_impl", action="store_true", help="vLLM in place of this engine")
    engines.add_argument("--use_hf_impl", action="store_true", help="transformers in place of this engine")
    for family in DEFAULT_MODES:
        engines.add_argument(f"--{family}_options", type=_options, default={}, help="its keyword arguments, as JSON")
    engines.add_argument(
        "--longest",
        type=_options,
        default={},
        help='leave out an engine\'s cases of more generated tokens: \'{"hf": 512, "vllm-default": 128}\'',
    )
    engines.add_argument("--timeout", type=float, default=900.0, help="seconds a worker may take for one command")
    peaks = parser.add_argument_group("peaks, by which fractions are given (default: known for some GPUs)")
    peaks.add_argument("--matrix_peak", type=float, help="FLOP/s of a large bf16 matrix product")
    peaks.add_argument("--read_bandwidth", type=float, help="bytes/s of a streaming read")
    peaks.add_argument("--measure_peaks", action="store_true", help="measure both first")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        type=Path,
        help='results, rewritten after every case; with several suites, "{suite}" in it is the name',
    )
    output.add_argument("--append", action="store_true", help="add to the results in --json (same model, same GPU)")
    output.add_argument("--csv", type=Path, help="results as a table, a row a measurement")
    output.add_argument("--plot", type=Path, help="a PNG of the throughputs; one more for a second way of sampling")
    output.add_argument("--hardware_csv", type=Path, help="other hardware, as columns of the boxed tables")
    output.add_argument("--log_folder", type=Path, help="keep each engine's own output there")
    args = parser.parse_args(dashed_aliases(argv))
    _complete(args)
    return args


def _complete(args: argparse.Namespace) -> None:
    """Derive `modes`, `suites` and `is_single`; raises RequestError where flags contradict each other."""
    if args.suite and args.scenarios:
        raise RequestError("--suite and --scenarios both say what to measure: give one of them")
    if args.engines and (args.use_vllm_impl or args.use_hf_impl):
        raise RequestError("--engines and --use_..._impl both say which engine to measure: give one of them")
    if args.repeats < 1:
        raise RequestError(f"--repeats is {args.repeats}; it must be at least 1")
    if args.startup and args.profile:
        raise RequestError("--startup and --profile are measurements of their own: run one after the other")
    if args.profile and args.sampling == "both":
        raise RequestError("--profile traces one way of sampling: give --sampling mission or greedy")
    if args.append and args.json is None:
        raise RequestError("--append adds to the file that --json names: give both")
    for name, limit in args.longest.items():
        if (name not in DEFAULT_MODES and name not in MODES) or not isinstance(limit, int) or limit < 1:
            raise RequestError(f"--longest holds {name!r}: {limit!r}; it takes engines and a number of tokens for each")
    single = [name for name, wanted in (("vllm", args.use_vllm_impl), ("hf", args.use_hf_impl)) if wanted]
    names = args.engines.split(",") if args.engines else single or ["ours"]
    args.modes = select_modes([name.strip() for name in names])
    args.is_single = not (args.suite or args.scenarios)
    args.suites = [
        ChosenSuite(name, cases, samplings(args.sampling or DEFAULT_SAMPLING[name])) for name, cases in _chosen(args)
    ]
    if len(args.suites) > 1 and (args.startup or args.profile):
        raise RequestError("--startup and --profile take one suite")
    if args.plot is not None:
        check_path(args.plot)
    for flag in ("json", "csv", "plot") if len(args.suites) > 1 else ():
        path = getattr(args, flag)
        if path is not None and "{suite}" not in str(path):
            raise RequestError(f'--{flag} is {path}; with several suites it must hold "{{suite}}", a file for each')


def _chosen(args: argparse.Namespace) -> list[tuple[str, tuple[Case, ...]]]:
    """Name and cases of what is to be measured."""
    if args.scenarios:
        return [("scenarios", parse_cases(args.scenarios))]
    if not args.suite:
        return [("single", (Case(args.max_gen_batch_size, args.input_len, args.max_gen_len),))]
    names = list(dict.fromkeys(name.strip() for name in args.suite.split(",")))
    if unknown := [name for name in names if name not in SUITES]:
        raise RequestError(f"--suite names {unknown[0]!r}; there are {_SUITE_NAMES}")
    return [(name, SUITES[name]) for name in names]


def _options(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"{text} is no JSON object")
    return values


def main(argv: list[str]) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a run that is stopped has printed its lines
    try:
        execute(parse_args(argv))
    except NothingMeasured:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
