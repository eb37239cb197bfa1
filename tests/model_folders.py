"""Small Hugging Face model folders for tests, written by transformers itself, and the ways to spoil them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

DEFAULTS: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # 4 heads of 64 make 256, not hidden_size: a transposed or mis-sized projection cannot pass
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,  # wide enough that the best token is clear of the second one
}


def make_model_folder(
    folder: Path,
    *,
    rope_factor: float | None = None,
    rope_theta: float = 500000.0,
    schema: int = 5,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> LlamaForCausalLM:
    """Write a folder (config, generation config, weights; no tokenizer) and return the transformers model saved there.

    `rope_factor` is None, 8 or 32 as in Llama 3, 3.1 and 3.2. `schema` 4 or 5 is the transformers version whose
    config.json is written. `sharded` makes an index and several shards. Other keywords replace DEFAULTS, by their
    LlamaConfig names.
    The model is in eval mode with eager attention. Norm weights are random too, so that a mistaken one shows.
    """
    rope: dict[str, Any] = {"rope_theta": rope_theta, "rope_type": "default"}
    if rope_factor is not None:
        rope |= {"rope_type": "llama3", "factor": float(rope_factor), "original_max_position_embeddings": 8192}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(**(DEFAULTS | overrides), rope_parameters=rope)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.data = parameter.data.to(dtype)  # model.to(dtype) would round the rotary frequencies too
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3 if sharded else size * 2)
    if schema == 4:
        _write_schema_4(Path(folder))
    return model


def _write_schema_4(folder: Path) -> None:
    config = read_json(folder / "config.json")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.45.0"
    write_json(folder / "config.json", config)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2))


def edit_config(folder: Path, *, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Rewrite keys of config.json; `remove` names keys to take out."""
    config = read_json(folder / "config.json") | changes
    write_json(folder / "config.json", {key: value for key, value in config.items() if key not in remove})


def edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None], file: str = "model.safetensors") -> None:
    """Rewrite tensors of one safetensors file: None removes one, a new name adds one."""
    tensors: dict[str, torch.Tensor | None] = {**load_file(folder / file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / file)
