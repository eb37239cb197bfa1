"""python -m llama3 generate "…"   complete one or more prompts, streaming to standard output.
python -m llama3 chat           talk to a model.
"""

import argparse
import sys

from llama3 import LLM
from llama3.chat_command import chat
from llama3.cli import (
    add_model_arguments,
    add_sampling_arguments,
    dashed_aliases,
    model_arguments,
    run_main,
    sampling_params,
)


def generate(args: argparse.Namespace) -> None:
    """Stream a completion of each prompt; the text alone goes to standard output."""
    params = sampling_params(args)
    with LLM(**model_arguments(args)) as llm:
        print(f"{llm.name}: {llm.kernels}", file=sys.stderr)
        for prompt in args.prompt:
            for piece in llm.stream(prompt, params):
                print(piece, end="", flush=True)
            print()
            stats = llm.stats
            rate = stats.num_generated_tokens / max(stats.prefill_seconds + stats.decode_seconds, 1e-9)
            print(f"{stats.num_generated_tokens} tokens, {rate:.1f} tok/s", file=sys.stderr)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llama3", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    complete = commands.add_parser("generate", help="complete prompts")
    complete.add_argument("prompt", nargs="+", help="text to complete")
    add_model_arguments(complete)
    add_sampling_arguments(complete, max_gen_len=256, temperature=0.6, top_p=0.9)
    complete.set_defaults(run=generate)

    talk = commands.add_parser("chat", help="a conversation; /reset, /system TEXT, /exit, Ctrl-C stops an answer")
    add_model_arguments(talk)
    add_sampling_arguments(talk, max_gen_len=1024, temperature=0.6, top_p=0.9)
    talk.add_argument("--system", help="system message to begin with")
    talk.set_defaults(run=chat)
    return parser.parse_args(dashed_aliases(argv))


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_main(main)
