"""Command-line flags that the scripts share. Every flag is accepted with underscores and with dashes."""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama3.errors import UserError
from llama3.sampling_params import SamplingParams

DEMO_MODEL = Path(__file__).parent.parent / "models" / "demo"
INTERRUPTED = 130


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main`: an error of the user's is one line and exit code 2, Ctrl-C is exit code 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not Unicode shows what it can
    try:
        main(sys.argv[1:])
        if not flushed_output():
            sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        flushed_output()


def flushed_output() -> bool:
    """Flush standard output. False if whoever read it has enough of it: what is left then goes nowhere, in silence."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        return True
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False


def dashed_aliases(argv: list[str]) -> list[str]:
    """The arguments with the dashes inside flag names turned into underscores: --max-gen-len is --max_gen_len."""
    normal: list[str] = []
    for i, argument in enumerate(argv):
        if argument == "--":
            return normal + argv[i:]
        name, equals, value = argument.partition("=")
        is_flag = re.fullmatch(r"--[A-Za-z][\w-]*", name)  # "-- a comment" is a prompt
        normal.append("--" + name[2:].replace("-", "_") + equals + value if is_flag else argument)
    return normal


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model_name --dtype --device --kernels --max_model_len --seed"""
    parser.add_argument("--model_name", default=str(DEMO_MODEL), help="local folder or hub name (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto (the folder's), bfloat16, float16 or float32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--kernels", default="auto", help="auto, reference (PyTorch) or cuda (our kernels, or an error)"
    )
    parser.add_argument("--max_model_len", type=int, help="most tokens of prompt and answer together")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (default: %(default)s)")


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for LLM."""
    return {
        "model": args.model_name,
        "dtype": args.dtype,
        "device": args.device,
        "kernels": args.kernels,
        "max_model_len": args.max_model_len,
        "seed": args.seed,
    }


def add_sampling_arguments(parser: argparse.ArgumentParser, max_gen_len: int, temperature: float, top_p: float) -> None:
    """--max_gen_len --temperature --top_p --top_k, with the script's own defaults."""
    parser.add_argument("--max_gen_len", type=int, default=max_gen_len, help="most tokens to generate (%(default)s)")
    parser.add_argument("--temperature", type=float, default=temperature, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_p", type=float, default=top_p, help="(default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="0 for no limit (default: %(default)s)")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_tokens=args.max_gen_len)
