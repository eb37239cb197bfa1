"""A model in memory: everything that comes out of a folder."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama3.checkpoint import load_weights
from llama3.config import ModelConfig
from llama3.device import resolve_device, resolve_dtype
from llama3.errors import ConfigError
from llama3.hub import resolve_folder
from llama3.json_file import JsonObject
from llama3.plan import MemoryPlan, free_memory
from llama3.tokenizer import Tokenizer
from llama3.weights import ModelWeights, random_weights

# generation_config.json's keys that SamplingParams knows; its other keys do not concern sampling here.
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p")


@dataclass
class LoadedModel:
    """Parameters on their device, with the tokenizer (None if the folder has none) and what generation_config.json says
    of sampling and of the ids that end an answer."""

    name: str
    config: ModelConfig
    weights: ModelWeights
    tokenizer: Tokenizer | None = None
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    load_seconds: float = 0.0
    stop_ids: frozenset[int] = frozenset()

    @classmethod
    def load(
        cls, name: str | Path, dtype: str | torch.dtype, device: str | torch.device, show_progress: bool
    ) -> "LoadedModel":
        """Read a local folder or a hub name. Raises UserError before anything large is allocated, where it can."""
        target = resolve_device(device)
        folder = resolve_folder(name)
        config = ModelConfig.from_folder(folder)
        resolved_dtype = resolve_dtype(dtype, config)
        tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
        weight_bytes = config.weight_bytes(resolved_dtype)
        MemoryPlan(config, resolved_dtype, free_memory(target), weight_bytes, num_batched_tokens=1).check(1, 1)
        generation_config = JsonObject.read_optional(folder / "generation_config.json", ConfigError)
        defaults = sampling_defaults(generation_config.values)
        stop_ids = frozenset(generation_config.token_ids("eos_token_id"))
        start = time.perf_counter()
        weights = load_weights(folder, config, target, resolved_dtype, progress=show_progress)
        weights.fold_norms()
        seconds = time.perf_counter() - start
        return cls(str(name), config, weights, tokenizer, defaults, seconds, stop_ids)

    @classmethod
    def random(cls, name: str, config: ModelConfig, device: str | torch.device, seed: int = 0) -> "LoadedModel":
        """Random parameters in the shape of `config`, without a tokenizer: for measuring speed."""
        weights = random_weights(config, resolve_device(device), seed=seed)
        weights.fold_norms()
        return cls(name, config, weights)


def sampling_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says explicitly about sampling; do_sample false means greedy."""
    if values.get("do_sample") is False:
        return {"temperature": 0.0}
    return {key: values[key] for key in SAMPLING_KEYS if values.get(key) is not None}
