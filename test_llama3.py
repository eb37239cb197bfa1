"""Load a Llama-3 model, complete a few prompts, and say how long each phase took.

python test_llama3.py                                        the small model in the repository
python test_llama3.py --model_name meta-llama/Llama-3.2-1B   a hub name or a local folder
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

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
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args(dashed_aliases(argv))


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    prompts, params = args.prompt or DEFAULT_PROMPTS, sampling_params(args)
    start = time.perf_counter()
    with LLM(**model_arguments(args)) as llm:
        ready = time.perf_counter()
        print(f"model:   {llm.name} ({llm.config.num_parameters / 1e6:.1f} M parameters, {llm.dtype})")
        print(f"device:  {device_name(llm.device)}; {llm.kernels}")
        outputs = llm.generate(prompts, params)
        for prompt, output in zip(prompts, outputs, strict=True):
            print(f"\n--- prompt ---\n{prompt}\n--- completion ---\n{output.outputs[0].text}")
        figures = measured(llm, start_seconds=ready - start)
    print_figures(figures)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measured(llm: LLM, start_seconds: float) -> dict[str, Any]:
    """What loading and generating took: seconds, GB/s, tokens, peak MiB on the GPU (null without one) and the host."""
    import resource

    stats, device = llm.stats, llm.device
    weight_gb = llm.config.weight_bytes(llm.dtype) / 1e9
    return {
        "parameters": llm.config.num_parameters,
        "dtype": str(llm.dtype),
        "device": device_name(device),
        "kernels": llm.kernels,
        "start_seconds": start_seconds,
        "load_seconds": llm.load_seconds,
        "load_gb_per_second": weight_gb / llm.load_seconds,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "num_prompt_tokens": stats.num_prompt_tokens,
        "num_generated_tokens": stats.num_generated_tokens,
        "tokens_per_second": stats.num_generated_tokens / (stats.prefill_seconds + stats.decode_seconds),
        "gpu_peak_mib": torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
        "host_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def print_figures(f: dict[str, Any]) -> None:
    rate = f"{f['load_gb_per_second']:.1f} GB/s"
    print(f"\nload:    {f['load_seconds']:.2f} s at {rate}, of {f['start_seconds']:.2f} s to start")
    print(f"prefill: {f['prefill_seconds']:.3f} s, {f['num_prompt_tokens']} tokens, first token included")
    print(f"decode:  {f['decode_seconds']:.3f} s, {f['num_generated_tokens']} tokens in all")
    print(f"speed:   {f['tokens_per_second']:.1f} tok/s")
    gpu = "" if f["gpu_peak_mib"] is None else f"{f['gpu_peak_mib']:.0f} MiB peak on the GPU, "
    print(f"memory:  {gpu}{f['host_peak_mib']:.0f} MiB peak on the host")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    run_main(main)
