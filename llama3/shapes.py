"""The shapes of the published Llama-3 models, by name: for random models, plans and benchmarks without a checkpoint."""

from dataclasses import replace

import torch

from llama3.config import ModelConfig, RopeScaling
from llama3.errors import ConfigError


def _rope_scaling(factor: float) -> RopeScaling:
    return RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


_LLAMA_3_1_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=_rope_scaling(8.0),
    tie_word_embeddings=False,
    dtype=torch.bfloat16,
    bos_token_id=128000,
    eos_token_ids=frozenset({128001}),
)

SHAPES = {
    "8b": _LLAMA_3_1_8B,  # Llama 3.1
    "70b": replace(  # Llama 3.1 and 3.3
        _LLAMA_3_1_8B, num_layers=80, hidden_size=8192, intermediate_size=28672, num_heads=64
    ),
    "1b": replace(  # Llama 3.2
        _LLAMA_3_1_8B,
        num_layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        head_dim=64,
        rope_scaling=_rope_scaling(32.0),
        tie_word_embeddings=True,
    ),
    "3b": replace(  # Llama 3.2
        _LLAMA_3_1_8B,
        num_layers=28,
        hidden_size=3072,
        intermediate_size=8192,
        num_heads=24,
        rope_scaling=_rope_scaling(32.0),
        tie_word_embeddings=True,
    ),
    "tiny": replace(  # not published: a Llama 3.2 in miniature, for seconds on a CPU
        _LLAMA_3_1_8B,
        num_layers=2,
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=8192,
        rope_scaling=_rope_scaling(32.0),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=frozenset({1}),
    ),
}


def shape_config(name: str, num_layers: int | None = None) -> ModelConfig:
    """The config of the shape `name`, with another depth if asked. Raises ConfigError for a name not in SHAPES."""
    if name not in SHAPES:
        raise ConfigError(f'no shape is called "{name}"; there are {", ".join(sorted(SHAPES))}')
    if num_layers is not None and num_layers < 1:
        raise ConfigError(f"a model of {num_layers} layers is not possible")
    return SHAPES[name] if num_layers is None else replace(SHAPES[name], num_layers=num_layers)
