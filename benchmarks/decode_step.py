"""Check, then time, the persistent decode step with random weights in the shapes of the published models.

    python -m benchmarks.decode_step --shape 1b,3b,8b --json results/decode_step/h200.json

The check compares logits with the reference ops in fp32. A timing is the median over graph replays of several launches,
each of which decodes `--steps` tokens one from the other, from the given context on; the floor is the bytes of weights
and cache over the memory's measured read rate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.graph_timing import capture, replay_seconds
from benchmarks.json_file import write_json
from benchmarks.peaks import H200_READ_BANDWIDTH
from llama3.config import ModelConfig
from llama3.decode_state import DecodeState
from llama3.forward_batch import DecodeBatch
from llama3.kv_cache import KVCache
from llama3.model import Transformer
from llama3.ops.decode_step import DecodeStep
from llama3.ops.reference import ReferenceOps
from llama3.rope import RopeTable
from llama3.shapes import shape_config
from llama3.weights import LayerWeights, ModelWeights, random_weights

TOKENS = 128  # timed in one replay
NEVER = 1 << 30


def to_float(weights: ModelWeights) -> ModelWeights:
    products = ("qkv", "o", "gate_up", "down")  # the norms are part of them
    layers = [
        LayerWeights(attn_norm=None, mlp_norm=None, **{name: getattr(layer, name).float() for name in products})
        for layer in weights.layers
    ]
    embed = weights.embed.float()
    head = embed if weights.lm_head is weights.embed else weights.lm_head.float()
    return ModelWeights(embed=embed, layers=layers, final_norm=weights.final_norm.float(), lm_head=head)


class Setup:
    """One model with random weights, a random cache of one slot, and a decode step over them."""

    def __init__(self, config: ModelConfig, max_len: int) -> None:
        self.config, device = config, torch.device("cuda")
        self.weights = random_weights(config, device, torch.bfloat16)
        self.weights.fold_norms()  # as the engine runs them
        self.rope = RopeTable.build(config, max_len, device)
        self.cache = KVCache(config, 1, max_len, torch.bfloat16, device)
        generator = torch.Generator(device=device).manual_seed(1)
        for tensor in (self.cache.k, self.cache.v):
            tensor.normal_(generator=generator)
        self.state = DecodeState(1, 1, device)
        self.state.last_positions.fill_(NEVER)
        self.state.first_stop_positions.fill_(NEVER)
        self.step = DecodeStep(config, self.weights, self.rope, self.cache, self.state)

    def check(self, context: int) -> dict[str, float]:
        """Relative error of the logits after `context` cached tokens: this kernel's, and that of bf16 PyTorch."""
        self.state.token_ids.fill_(17)
        self.state.positions.fill_(context)
        self.step.launch()
        got = self.step.logits.clone()
        self.step.launch()
        if not torch.equal(got, self.step.logits):
            raise SystemExit("two runs of one step differ")
        results = {}
        truth = None
        for weights in (to_float(self.weights), self.weights):
            dtype = weights.embed.dtype
            cache = KVCache(self.config, 1, context + 1, dtype, "cuda")
            cache.k.copy_(self.cache.k[:, : cache.blocks_per_slot])
            cache.v.copy_(self.cache.v[:, : cache.blocks_per_slot])
            batch = DecodeBatch(self.state.slots, self.state.positions, context + 1)
            logits = Transformer(self.config, weights, ReferenceOps(), self.rope).decode_step(
                self.state.token_ids, batch, cache
            )
            if truth is None:
                truth = logits.double()
                results["kernel"] = relative_error(got, truth)
            else:
                results["bf16"] = relative_error(logits, truth)
        if not results["kernel"] <= 2 * results["bf16"]:
            raise SystemExit(f"logits are wrong at context {context}: {results}")
        return results

    def time(self, context: int, steps: int, temperature: float, repeats: int) -> list[float]:
        """Microseconds a token, one value a replay."""
        self.state.sampling.temperature.fill_(temperature)
        drawn = torch.zeros(steps, dtype=torch.int64, device="cuda")
        launches = max(TOKENS // steps, 1)
        self.state.positions.fill_(context)
        graph = capture([lambda: self.step.launch(drawn)] * launches)
        times = []
        for _ in range(repeats):
            self.state.positions.fill_(context)
            times.append(replay_seconds(graph) * 1e6 / (launches * steps))
        assert int(self.state.positions[0]) == context + launches * steps, "the steps did not run"
        return times


def relative_error(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a.double() - truth).norm() / truth.norm())


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--contexts", type=numbers, default=[128, 2048, 8192, 32768])
    parser.add_argument("--steps", type=numbers, default=[1, 8], help="tokens a launch")
    parser.add_argument("--temperatures", default="0")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.shape.split(","):
        config = shape_config(name)
        setup = Setup(config, max(args.contexts) + TOKENS + 64)
        errors = setup.check(200)
        print(f"{name}: relative error of the logits {errors['kernel']:.1e} (bf16 PyTorch: {errors['bf16']:.1e})")
        for context in args.contexts:
            for steps in args.steps:
                for temperature in map(float, args.temperatures.split(",")):
                    times = setup.time(context, steps, temperature, args.repeats)
                    micros = statistics.median(times)
                    moved = config.decode_weight_bytes() + config.kv_bytes_per_token() * (context + TOKENS // 2)
                    floor = moved / H200_READ_BANDWIDTH * 1e6
                    rows.append(
                        {
                            "shape": name,
                            "context_len": context,
                            "steps_per_launch": steps,
                            "temperature": temperature,
                            "us_per_token": micros,
                            "us_min": min(times),
                            "us_max": max(times),
                            "tokens_per_s": 1e6 / micros,
                            "bytes": moved,
                            "floor_us": floor,
                            "fraction_of_floor": floor / micros,
                            "logits_relative_error": errors["kernel"],
                            "logits_relative_error_bf16_torch": errors["bf16"],
                        }
                    )
                    print(
                        f"{name} context {context:6} steps/launch {steps:2} T {temperature:.1f}: {micros:7.1f} us "
                        f"({min(times):.1f}..{max(times):.1f}), {1e6 / micros:6.0f} tok/s, "
                        f"{floor / micros:.1%} of {floor:.0f} us",
                        flush=True,
                    )
        del setup
        torch.cuda.empty_cache()
    if args.json:
        properties = torch.cuda.get_device_properties(0)
        about = {"gpu": properties.name, "torch": torch.__version__, "cuda": torch.version.cuda, "tokens": TOKENS}
        write_json({"about": about, "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
