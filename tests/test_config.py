"""ModelConfig: both schemas mean what transformers says, the unclear is refused by name, the arithmetic is exact."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llama3.config import ModelConfig, RopeScaling
from llama3.errors import ConfigError, UserError
from llama3.shapes import SHAPES, shape_config
from tests.model_folders import edit_config, make_model_folder, read_json
from tools.make_random_model import hf_config

VALID: dict[str, Any] = {
    **hf_config(SHAPES["1b"], torch.bfloat16, schema=4),
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}


@pytest.mark.parametrize("schema", [4, 5])
@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
@pytest.mark.parametrize("tied", [True, False])
def test_reads_what_transformers_saved(tmp_path: Path, schema: int, factor: float | None, tied: bool):
    model = make_model_folder(
        tmp_path, schema=schema, rope_factor=factor, tie_word_embeddings=tied, dtype=torch.bfloat16, eos_token_id=[5, 7]
    )
    config, theirs = ModelConfig.from_folder(tmp_path), model.config
    assert theirs.num_key_value_heads and theirs.head_dim
    assert ("rope_scaling" in read_json(tmp_path / "config.json")) == (schema == 4)
    assert config == ModelConfig(
        num_layers=theirs.num_hidden_layers,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        vocab_size=theirs.vocab_size,
        max_position_embeddings=theirs.max_position_embeddings,
        rms_norm_eps=theirs.rms_norm_eps,
        rope_theta=500000.0,
        rope_scaling=None if factor is None else RopeScaling(factor, 1.0, 4.0, 8192),
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
        bos_token_id=0,
        eos_token_ids=frozenset({5, 7}),
    )


@given(
    name=st.sampled_from(sorted(SHAPES)),
    schema=st.sampled_from([4, 5]),
    theta=st.floats(1.0, 1e9),
    scaling=st.none()
    | st.builds(RopeScaling, st.floats(1, 64), st.floats(0.1, 2), st.floats(3, 8), st.integers(1, 9000)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    eos=st.frozensets(st.integers(0, 200000), max_size=4),
    bos=st.none() | st.integers(0, 200000),
)
@settings(max_examples=50)
def test_a_written_config_reads_back_equal(name, schema, theta, scaling, dtype, eos, bos):
    config = replace(
        SHAPES[name], rope_theta=theta, rope_scaling=scaling, dtype=dtype, eos_token_ids=eos, bos_token_id=bos
    )
    written = hf_config(config, dtype, schema) | {"bos_token_id": bos, "eos_token_id": sorted(eos)}
    assert ModelConfig.from_dict(json.loads(json.dumps(written))) == config


def test_older_spellings_are_understood():
    rope = VALID["rope_scaling"]
    early = {key: value for key, value in rope.items() if key != "rope_type"} | {"type": "llama3"}
    assert ModelConfig.from_dict(VALID | {"rope_scaling": early}) == ModelConfig.from_dict(VALID)
    assert ModelConfig.from_dict(VALID | {"rope_scaling": None}).rope_scaling is None
    assert ModelConfig.from_dict(without("rope_scaling")).rope_scaling is None
    assert ModelConfig.from_dict(VALID | {"rope_scaling": {"type": "default"}}).rope_scaling is None
    assert ModelConfig.from_dict(VALID | {"torch_dtype": "torch.float16"}).dtype == torch.float16
    assert ModelConfig.from_dict(VALID | {"head_dim": None}).head_dim == 64  # 2048 / 32
    assert ModelConfig.from_dict(VALID | {"eos_token_id": 2}).eos_token_ids == {2}
    assert ModelConfig.from_dict(without("eos_token_id", "bos_token_id")).eos_token_ids == frozenset()
    assert ModelConfig.from_dict(without("mlp_bias", "attention_bias")) == ModelConfig.from_dict(VALID)


def test_a_folder_in_both_schemas_at_once_must_agree_with_itself():
    both = hf_config(SHAPES["1b"], torch.bfloat16, schema=5) | VALID
    assert ModelConfig.from_dict(both) == ModelConfig.from_dict(VALID)


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in VALID.items() if key not in keys}


def rope(**changes: Any) -> dict[str, Any]:
    return {
        "rope_scaling": {key: value for key, value in (VALID["rope_scaling"] | changes).items() if value is not None}
    }


PARAMETERS = {"rope_type": "llama3", **VALID["rope_scaling"], "rope_theta": 500000.0}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mistral"}, 'model_type is "mistral"; only "llama" is supported'),
    (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures is ['LlamaForSequenceClassification']; only LlamaForCausalLM is supported",
    ),
    (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config says gptq; quantised folders are not supported",
    ),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu" is supported'),
    ({"attention_bias": True}, "attention_bias is true; projections with biases are not supported"),
    ({"mlp_bias": True}, "mlp_bias is true; projections with biases are not supported"),
    ({"head_dim": 96}, "head_dim is 96; the supported head sizes are 64 and 128"),
    (
        {"head_dim": None, "hidden_size": 2050},
        "head_dim is missing, and 32 attention heads do not divide hidden_size 2050",
    ),
    ({"head_dim": None, "hidden_size": 1024}, "head_dim is 32; the supported head sizes are 64 and 128"),
    ({"num_key_value_heads": 5}, "num_key_value_heads is 5, which does not divide num_attention_heads 32"),
    ({"intermediate_size": 8196}, "intermediate_size is 8196; a multiple of 8 is needed"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; a whole number of at least 1 is needed"),
    ({"num_hidden_layers": 16.0}, "num_hidden_layers is 16.0; a whole number of at least 1 is needed"),
    ({"vocab_size": "128256"}, "vocab_size is '128256'; a whole number of at least 1 is needed"),
    ({"num_attention_heads": True}, "num_attention_heads is True; a whole number of at least 1 is needed"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0; a number above 0 is needed"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; a number above 0 is needed"),
    ({"rope_theta": float("inf")}, "rope_theta is inf; a number above 0 is needed"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; true or false is needed"),
    ({"bos_token_id": -1}, "bos_token_id is -1; a token id is needed"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id is [1, '2']; a token id or a list of them is needed"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'; supported are bfloat16, float16, float32"),
    ({"dtype": "int8", "torch_dtype": None}, "dtype is 'int8'; supported are bfloat16, float16, float32"),
    ({"dtype": "float16"}, "dtype is 'float16' but torch_dtype is 'bfloat16'; they must be equal"),
    ({"torch_dtype": None}, "dtype is missing, and so is torch_dtype; one of them is needed"),
    (rope(rope_type="yarn"), 'rope_scaling.rope_type is "yarn"; supported are "llama3" and "default" (no scaling)'),
    (rope(rope_type=None), "rope_scaling.rope_type is missing; it has no default"),
    (
        rope(rope_type=None, type="linear"),
        'rope_scaling.type is "linear"; supported are "llama3" and "default" (no scaling)',
    ),
    (rope(factor=None), "rope_scaling.factor is missing; it has no default"),
    (rope(factor="8"), "rope_scaling.factor is '8'; a number above 0 is needed"),
    (rope(low_freq_factor=4.0), "rope_scaling.high_freq_factor is 4.0; it must exceed low_freq_factor 4.0"),
    (rope(partial_rotary_factor=0.5), "rope_scaling.partial_rotary_factor is 0.5; only 1 is supported"),
    ({"rope_scaling": 8}, "rope_scaling is 8; an object is needed"),
    ({"rope_theta": None}, "rope_theta is missing, also from rope_parameters; it has no default"),
    (
        {"rope_parameters": {**PARAMETERS, "rope_theta": 1e4}},
        "rope_theta is given twice and differs: rope_theta 500000.0, rope_parameters.rope_theta 10000.0",
    ),
    (
        {"rope_parameters": {**PARAMETERS, "factor": 8.0}},
        "rope_scaling and rope_parameters describe different scalings; they must be equal",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 5e5}, "rope_scaling": None},
        'rope_parameters.rope_type is "longrope"; supported are "llama3" and "default" (no scaling)',
    ),
]
REQUIRED = [
    "model_type",
    "hidden_act",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
]
BAD += [({key: None}, f"{key} is missing; it has no default") for key in REQUIRED]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(VALID | changes))
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("key", REQUIRED)
def test_an_absent_key_is_as_wrong_as_a_null(key: str):
    with pytest.raises(ConfigError, match=f"{key} is missing; it has no default"):
        ModelConfig.from_dict(without(key))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "llama",\n  "hidden_size": }', "not valid JSON at line 2, column 18: Expecting value"),
        (b"", "not valid JSON at line 1, column 1: Expecting value"),
        (b"[1, 2]", "holds a JSON list, an object is needed"),
        (b'{"a": "\xff"}', "not a text file (byte 7 is not UTF-8)"),
    ],
)
def test_a_corrupt_file_is_named_with_the_place(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'}: {message}"


def test_a_missing_or_unreadable_config_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read \(Is a directory\)"):
        ModelConfig.from_folder(tmp_path)


def test_errors_are_one_line():
    assert str(UserError("first\nsecond")) == "first second"
    assert issubclass(ConfigError, ValueError)


# Worked out by hand from the published sizes of Llama 3.2 1B and 3B, and of Llama 3.1 8B and 70B.
@pytest.mark.parametrize(
    ("name", "parameters", "decode_bytes", "kv_bytes"),
    [
        ("1b", 1_235_814_400, 2_471_628_800, 32_768),
        ("3b", 3_212_749_824, 6_425_499_648, 114_688),
        ("8b", 8_030_261_248, 15_009_849_344, 131_072),
        ("70b", 70_553_706_496, 139_006_066_688, 327_680),
    ],
)
def test_bytes_of_the_published_models(name: str, parameters: int, decode_bytes: int, kv_bytes: int):
    config = shape_config(name)
    assert config.num_parameters == parameters
    assert config.weight_bytes() == 2 * parameters
    assert config.weight_bytes(torch.float32) == 4 * parameters
    assert config.decode_weight_bytes() == decode_bytes
    assert config.kv_bytes_per_token() == kv_bytes
    assert config.kv_bytes_per_token(torch.float32) == 2 * kv_bytes


def test_unknown_shapes_are_refused():
    assert shape_config("8b", num_layers=3).num_layers == 3
    with pytest.raises(ConfigError, match='no shape is called "7b"; there are 1b, 3b, 70b, 8b, tiny'):
        shape_config("7b")
    with pytest.raises(ConfigError, match="0 layers"):
        shape_config("8b", num_layers=0)


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_and_flops_equal_what_transformers_holds_and_computes(tmp_path: Path, tied: bool):
    model = make_model_folder(tmp_path, tie_word_embeddings=tied, num_hidden_layers=3, num_key_value_heads=1)
    config = ModelConfig.from_folder(tmp_path)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.weight_bytes() == sum(parameter.nbytes for parameter in model.parameters())
    with torch.inference_mode():
        prompt = model(torch.arange(10)[None], use_cache=True)
        cache = prompt.past_key_values
        assert config.kv_bytes_per_token() * 10 == sum(
            layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
        )
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[11]]), past_key_values=cache)
    assert config.decode_flops(context_len=11) == counter.get_total_flops()
    head = 2 * config.embedding_parameters
    steps = [config.decode_flops(length) for length in range(1, 11)]
    assert config.prefill_flops(10) == sum(steps) - 9 * head


def test_edit_config_changes_what_it_says(tmp_path: Path):
    make_model_folder(tmp_path, schema=4)
    edit_config(tmp_path, remove=("rms_norm_eps",), vocab_size=7)
    values = read_json(tmp_path / "config.json")
    assert values["vocab_size"] == 7 and "rms_norm_eps" not in values
