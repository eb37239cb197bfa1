"""A transformers folder as our model, with no tokenizer in the way: engines, sequences and greedy runs for tests."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path

import torch

from llama3.checkpoint import load_weights
from llama3.config import ModelConfig
from llama3.engine import Engine
from llama3.kv_cache import KVCache
from llama3.model import Transformer
from llama3.ops.reference import ReferenceOps
from llama3.rope import RopeTable
from llama3.runner import PendingTokens, StepOptions
from llama3.sampling_params import SamplingParams
from llama3.sequence import Sequence

GREEDY_64 = SamplingParams(temperature=0, max_tokens=64)


def load_model(folder: Path, num_positions: int = 4096, dtype: torch.dtype | None = None) -> Transformer:
    config = ModelConfig.from_folder(folder)
    weights = load_weights(folder, config, "cpu", dtype, progress=False)
    weights.fold_norms()
    return Transformer(config, weights, ReferenceOps(), RopeTable.build(config, num_positions))


def poison(cache: KVCache) -> None:
    """Whatever is read before it is written, or past a context's end, turns the result into NaN."""
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)


def make_sequence(
    index: int, prompt: Items[int], params: SamplingParams = GREEDY_64, stop_ids: frozenset[int] = frozenset()
) -> Sequence:
    return Sequence(
        request=index,
        sample=0,
        prompt_ids=list(prompt),
        params=params,
        max_tokens=params.max_tokens or 64,
        stop_ids=stop_ids,
        seed=0 if params.seed is None else params.seed,
        rng_request=0 if params.seed is not None else index + 1,
    )


@dataclass(frozen=True)
class Launch:
    """Decode steps launched together: how many, over how many rows, and whether a prompt waited for a place."""

    num_steps: int
    num_rows: int
    waiting: bool


Draw = Callable[[Items[Sequence], Launch, StepOptions], torch.Tensor]


def launch_as_on_a_gpu(engine: Engine, draw: Draw) -> list[Launch]:
    """Make an engine on a CPU launch steps in groups, ahead of reading them. Returns the launches, as they come.

    draw: the sequences of a launch, the launch, their options -> tokens [num_steps, num_rows].
    """
    launches: list[Launch] = []

    def decode(sequences: Items[Sequence], num_steps: int, options: StepOptions) -> PendingTokens:
        rows = [s.row for s in sequences]
        launches.append(Launch(num_steps, max(rows) + 1, bool(engine.scheduler.waiting)))
        return PendingTokens(sequences, rows, draw(sequences, launches[-1], options), None)

    engine.runner.decode = decode  # type: ignore[method-assign]
    engine.device = torch.device("cuda")  # the engine's rules of launching go by it; what computes lies elsewhere
    return launches


def run_to_end(engine: Engine, sequences: Items[Sequence]) -> list[list[int]]:
    """Add sequences to an engine that is ready for them and step until nothing is left; their tokens."""
    engine.add(sequences)
    while engine.has_work:
        engine.step()
    assert all(s.finished for s in sequences)
    return [s.output_ids for s in sequences]


def run(
    model: Transformer,
    sequences: Items[Sequence],
    num_rows: int,
    token_budget: int = 2048,
    max_stop_ids: int = 4,
    launch_ahead: bool = False,
) -> list[list[int]]:
    """Run sequences over a poisoned cache to their end; their tokens. launch_ahead: as on a GPU."""
    engine = Engine(model, torch.device("cpu"), model.weights.embed.dtype)
    engine.prepare(num_rows, max(s.max_context_len for s in sequences), max_stop_ids, token_budget)
    assert engine.cache is not None
    poison(engine.cache)
    if launch_ahead:
        step = engine.runner._step
        launch_as_on_a_gpu(
            engine,
            lambda _, launch, options: torch.stack(
                [step(launch.num_rows, options).token_ids for _ in range(launch.num_steps)]
            ),
        )
    return run_to_end(engine, sequences)
