"""A transformers folder as our model, with no tokenizer in the way: engines, sequences and greedy runs for tests."""

from collections.abc import Sequence as Items
from pathlib import Path

import torch

from llama3.checkpoint import load_weights
from llama3.config import ModelConfig
from llama3.engine import Engine
from llama3.kv_cache import KVCache
from llama3.model import Transformer
from llama3.ops.reference import ReferenceOps
from llama3.rope import RopeTable
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


def run(
    model: Transformer, sequences: Items[Sequence], num_rows: int, token_budget: int = 2048, max_stop_ids: int = 4
) -> list[list[int]]:
    """Run sequences over a poisoned cache to their end; their tokens."""
    engine = Engine(model, torch.device("cpu"), model.weights.embed.dtype)
    engine.prepare(num_rows, max(s.max_context_len for s in sequences), max_stop_ids, token_budget)
    assert engine.cache is not None
    poison(engine.cache)
    engine.add(sequences)
    while engine.has_work:
        engine.step()
    assert all(s.finished for s in sequences)
    return [s.output_ids for s in sequences]
