"""ModelConfig: the shape and constants of a Llama-3 model, read strictly from a Hugging Face folder.

Nothing is guessed. A key that changes the numbers and is missing raises, because the class defaults of transformers
(base 10000, epsilon 1e-6, as many kv heads as heads) are the wrong answer for Llama 3. Keys that inference does not use
are ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama3.errors import ConfigError
from llama3.json_file import JsonObject, read_json_object

SUPPORTED_HEAD_DIMS = (64, 128)
SUPPORTED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GATE_UP_GROUP = 8  # rows of gate, then rows of up, in the packed projection; intermediate_size is a multiple of it


@dataclass(frozen=True)
class RopeScaling:
    """The frequency scaling of Llama 3.1 and later (rope type "llama3"): factor 8 for 3.1 and 3.3, 32 for 3.2."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """One Llama-3 model. Sizes count elements, `dtype` is the folder's, token ids are those of config.json alone."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    dtype: torch.dtype
    bos_token_id: int | None
    eos_token_ids: frozenset[int]

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `folder`/config.json in the schema of transformers 4 or 5. Raises ConfigError, naming the key."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json_object(path, ConfigError), str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> "ModelConfig":
        """The config held by the object of a config.json; `source` names it in errors."""
        keys = JsonObject(values, source, ConfigError)
        _check_family(keys)
        theta, scaling = _read_rope(keys)
        num_heads = keys.size("num_attention_heads")
        hidden_size = keys.size("hidden_size")
        head_dim = keys.size("head_dim") if keys.has("head_dim") else _divide(keys, hidden_size, num_heads)
        config = cls(
            num_layers=keys.size("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=keys.size("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=keys.size("num_key_value_heads"),
            head_dim=head_dim,
            vocab_size=keys.size("vocab_size"),
            max_position_embeddings=keys.size("max_position_embeddings"),
            rms_norm_eps=keys.positive("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=keys.boolean("tie_word_embeddings"),
            dtype=_read_dtype(keys),
            bos_token_id=keys.token_id("bos_token_id"),
            eos_token_ids=frozenset(keys.token_ids("eos_token_id")),
        )
        _check_shape(config, keys)
        return config

    # Sizes of the packed projections, in rows.

    @property
    def q_size(self) -> int:
        """Rows of the query projection: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection: num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Rows of the packed projection: all q heads, then all k heads, then all v heads."""
        return self.q_size + 2 * self.kv_size

    # What one model holds, and what one step reads and computes. Planning and benchmarks use these and nothing else.

    @property
    def projection_parameters(self) -> int:
        """Elements of the seven projections of all layers, without norms, embedding and head."""
        attention = (self.qkv_size + self.q_size) * self.hidden_size
        return self.num_layers * (attention + 3 * self.intermediate_size * self.hidden_size)

    @property
    def embedding_parameters(self) -> int:
        """Elements of the embedding table, which are also those of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def decode_parameters(self) -> int:
        """Elements that one decode step reads whatever the batch: layers, norms and the head once.

        The embedding gathers one row a token, which is left out.
        """
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.projection_parameters + norms + self.embedding_parameters

    @property
    def num_parameters(self) -> int:
        """Elements of the whole model; a tied head counts once."""
        return self.decode_parameters + (0 if self.tie_word_embeddings else self.embedding_parameters)

    def weight_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of memory of all weights in `dtype` (default: the folder's)."""
        return self.num_parameters * (dtype or self.dtype).itemsize

    def decode_weight_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of weights read by one decode step in `dtype` (default: the folder's)."""
        return self.decode_parameters * (dtype or self.dtype).itemsize

    def kv_bytes_per_token(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of K and V of one token in all layers, in `dtype` (default: the folder's)."""
        return 2 * self.num_layers * self.kv_size * (dtype or self.dtype).itemsize

    def decode_flops(self, context_len: int) -> int:
        """Floating-point operations of one new token that attends `context_len` tokens, itself included.

        2 a multiply-add: every projection and the head, and per layer q k^T and p v over the context. Norms, rotation
        and softmax are left out, as is usual.
        """
        attention = 4 * self.num_layers * self.q_size * context_len
        return 2 * (self.projection_parameters + self.embedding_parameters) + attention

    def prefill_flops(self, prompt_len: int) -> int:
        """Floating-point operations of a prompt: causal attention, and the head at the last position only."""
        attention = 4 * self.num_layers * self.q_size * (prompt_len * (prompt_len + 1) // 2)
        return 2 * (self.projection_parameters * prompt_len + self.embedding_parameters) + attention


def _check_family(keys: JsonObject) -> None:
    """Refuse what is not plain Llama: other families, quantised weights, biases, another activation."""
    if keys.get("model_type") != "llama":
        keys.fail("model_type", f'is "{keys.get("model_type")}"; only "llama" is supported')
    architectures = keys.values.get("architectures") or ["LlamaForCausalLM"]
    if "LlamaForCausalLM" not in architectures:
        keys.fail("architectures", f"is {architectures}; only LlamaForCausalLM is supported")
    if keys.has("quantization_config"):
        method = keys.values["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        keys.fail("quantization_config", f"says {method}; quantised folders are not supported")
    if keys.get("hidden_act") != "silu":
        keys.fail("hidden_act", f'is "{keys.get("hidden_act")}"; only "silu" is supported')
    for key in ("attention_bias", "mlp_bias"):  # older folders lack them, and then have no biases
        if keys.has(key) and keys.boolean(key):
            keys.fail(key, "is true; projections with biases are not supported")


def _check_shape(config: ModelConfig, keys: JsonObject) -> None:
    if config.head_dim not in SUPPORTED_HEAD_DIMS:
        keys.fail("head_dim", f"is {config.head_dim}; the supported head sizes are 64 and 128")
    if config.num_heads % config.num_kv_heads:
        keys.fail(
            "num_key_value_heads",
            f"is {config.num_kv_heads}, which does not divide num_attention_heads {config.num_heads}",
        )
    if config.intermediate_size % GATE_UP_GROUP:
        keys.fail("intermediate_size", f"is {config.intermediate_size}; a multiple of {GATE_UP_GROUP} is needed")


def _divide(keys: JsonObject, hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        keys.fail("head_dim", f"is missing, and {num_heads} attention heads do not divide hidden_size {hidden_size}")
    return hidden_size // num_heads


def _read_dtype(keys: JsonObject) -> torch.dtype:
    """`dtype` (transformers 5) or `torch_dtype` (transformers 4); a folder that has both must agree with itself."""
    names = {key: keys.values[key] for key in ("dtype", "torch_dtype") if keys.has(key)}
    if not names:
        keys.fail("dtype", "is missing, and so is torch_dtype; one of them is needed")
    key, name = next(iter(names.items()))
    if len(set(map(str, names.values()))) > 1:
        keys.fail("dtype", f"is {names['dtype']!r} but torch_dtype is {names['torch_dtype']!r}; they must be equal")
    dtype = SUPPORTED_DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        keys.fail(key, f"is {name!r}; supported are {', '.join(SUPPORTED_DTYPES)}")
    return dtype


def _read_rope(keys: JsonObject) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4).

    A folder may hold both schemas; where they differ it would be two different models.
    """
    sections = [keys.object(key) for key in ("rope_parameters", "rope_scaling") if keys.has(key)]
    places = [place for place in (keys, *sections) if place.has("rope_theta")]
    bases = {f"{place.prefix}rope_theta": place.positive("rope_theta") for place in places}
    if not bases:
        keys.fail("rope_theta", "is missing, also from rope_parameters; it has no default")
    if len(set(bases.values())) > 1:
        keys.fail("rope_theta", f"is given twice and differs: {', '.join(f'{key} {bases[key]}' for key in bases)}")
    scalings = [_read_rope_scaling(section) for section in sections] or [None]
    if scalings[0] != scalings[-1]:
        keys.fail("rope_scaling", "and rope_parameters describe different scalings; they must be equal")
    return next(iter(bases.values())), scalings[0]


def _read_rope_scaling(rope: JsonObject) -> RopeScaling | None:
    kind_key = (
        "rope_type" if rope.has("rope_type") or not rope.has("type") else "type"
    )  # "type": before transformers 4.45
    kind = rope.get(kind_key)
    if kind not in ("default", "llama3"):
        rope.fail(kind_key, f'is "{kind}"; supported are "llama3" and "default" (no scaling)')
    if rope.has("partial_rotary_factor") and rope.positive("partial_rotary_factor") != 1:
        rope.fail("partial_rotary_factor", f"is {rope.values['partial_rotary_factor']}; only 1 is supported")
    if kind == "default":
        return None
    scaling = RopeScaling(
        factor=rope.positive("factor"),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        rope.fail(
            "high_freq_factor",
            f"is {scaling.high_freq_factor}; it must exceed low_freq_factor {scaling.low_freq_factor}",
        )
    return scaling
