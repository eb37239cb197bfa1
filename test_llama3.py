"""Load a Llama-3 model, complete a few prompts, and say how long each phase took.

python test_llama3.py                                        the small model in the repository
python test_llama3.py --model_name meta-llama/Llama-3.2-1B   a hub name or a local folder
"""

import argparse
import time

import torch

from llama3 import LLM
from llama3.cli import (
    add_model_arguments,
    add_sampling_arguments,
    dashed_aliases,
    model_arguments,
    run_main,
    sampling_params,
)

DEFAULT_PROMPTS = [
    "def read_lines(path, encoding='utf-8'):\n",
    'class Stack:\n    """A last-in, first-out list."""\n\n',
    "def parse_args(argv):\n",
]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="test_llama3.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", help="text to complete; repeat for several")
    add_sampling_arguments(parser, max_gen_len=128, temperature=0.8, top_p=0.95)
    return parser.parse_args(dashed_aliases(argv))


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    prompts = args.prompt or DEFAULT_PROMPTS
    start = time.perf_counter()
    with LLM(**model_arguments(args)) as llm:
        ready = time.perf_counter()
        print(f"model:   {llm.name} ({llm.config.num_parameters / 1e6:.1f} M parameters, {llm.dtype})")
        print(f"device:  {device_name(llm.device)}; {llm.kernels}")
        outputs = llm.generate(prompts, sampling_params(args))
        for prompt, output in zip(prompts, outputs, strict=True):
            print(f"\n--- prompt ---\n{prompt}\n--- completion ---\n{output.outputs[0].text}")
        stats = llm.stats
        rate = llm.config.weight_bytes(llm.dtype) / 1e9 / llm.load_seconds
        print(f"\nload:    {llm.load_seconds:.2f} s at {rate:.1f} GB/s, of {ready - start:.2f} s to start")
        print(f"prefill: {stats.prefill_seconds:.3f} s, {stats.num_prompt_tokens} tokens, first token included")
        print(f"decode:  {stats.decode_seconds:.3f} s, {stats.num_generated_tokens} tokens in all")
        seconds = stats.prefill_seconds + stats.decode_seconds
        print(f"speed:   {stats.num_generated_tokens / seconds:.1f} tok/s")
        print(f"memory:  {peak_memory(llm.device)}")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory(device: torch.device) -> str:
    """Peak memory of this process: on the GPU as PyTorch counts it, and on the host."""
    import resource

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**20
    if device.type != "cuda":
        return f"{host:.0f} MiB peak on the host"
    return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB peak on the GPU, {host:.0f} MiB on the host"


if __name__ == "__main__":
    run_main(main)
