"""Write a complete Hugging Face folder in the shape of a published Llama 3, with random weights.

For loading, memory and speed at full size on a machine that has no checkpoint: the bytes are real, the text is noise.
    python tools/make_random_model.py --shape 8b OUT
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama3.checkpoint import INDEX_FILE, SINGLE_FILE, tensor_targets
from llama3.config import SUPPORTED_DTYPES, ModelConfig
from llama3.errors import CapacityError, ConfigError, UserError
from llama3.json_file import read_json_object
from llama3.shapes import SHAPES, shape_config
from llama3.weights import empty_weights

DEMO_FOLDER = Path(__file__).resolve().parent.parent / "models" / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def make_random_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_bytes: int = 5 * 10**9,
    schema: int = 5,
    progress: bool = True,
) -> None:
    """Fill `folder` (new or empty): config, generation config, weights in shards, the bundled tokenizer if it exists.

    Holds one shard in memory at a time. `schema` is the transformers version (4 or 5) whose config.json is written.
    Raises ConfigError if the folder holds something, CapacityError if the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"{folder}: not empty; give a new folder")
    needed, free = config.weight_bytes(dtype), shutil.disk_usage(folder).free
    if needed > free:
        raise CapacityError(f"{folder}: the weights take {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    token_ids: dict[str, Any] = {"bos_token_id": config.bos_token_id, "eos_token_id": sorted(config.eos_token_ids)}
    if (DEMO_FOLDER / "tokenizer.json").is_file():
        token_ids = _copy_tokenizer(folder)
    _write_json(folder / "config.json", hf_config(config, dtype, schema) | token_ids)
    _write_json(folder / "generation_config.json", token_ids)
    _write_weights(folder, config, dtype, seed, max_shard_bytes, progress)


def hf_config(config: ModelConfig, dtype: torch.dtype, schema: int) -> dict[str, Any]:
    """config.json as transformers 4 or 5 writes it, without the token ids."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3", **vars(config.rope_scaling)}
    dtype_name = str(dtype).removeprefix("torch.")
    by_schema: dict[int, dict[str, Any]] = {
        4: {
            "rope_theta": config.rope_theta,
            "rope_scaling": None if config.rope_scaling is None else rope,
            "torch_dtype": dtype_name,
        },
        5: {"rope_parameters": {"rope_theta": config.rope_theta, **rope}, "dtype": dtype_name},
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        **by_schema[schema],
    }


def _copy_tokenizer(folder: Path) -> dict[str, Any]:
    """Copy the bundled tokenizer, and return the special ids that go with it."""
    for name in TOKENIZER_FILES:
        if (DEMO_FOLDER / name).is_file():
            shutil.copy(DEMO_FOLDER / name, folder / name)
    demo = read_json_object(DEMO_FOLDER / "config.json", ConfigError)
    return {key: demo.get(key) for key in ("bos_token_id", "eos_token_id")}


def _write_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, seed: int, max_shard_bytes: int, progress: bool
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(seed)
    targets = tensor_targets(empty_weights(config, "meta", dtype), config)
    shapes = {name: target.shape for name, target in targets.items() if not target.compare}
    shards = _split_into_shards(shapes, dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = config.weight_bytes(dtype)
    with tqdm(total=total, desc="Writing weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for number, names in enumerate(shards, start=1):
            single = len(shards) == 1
            file = SINGLE_FILE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: _random_tensor(shapes[name], dtype, generator) for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
            bar.update(sum(tensor.nbytes for tensor in tensors.values()))
    if len(shards) > 1:
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split_into_shards(shapes: dict[str, tuple[int, ...]], item_bytes: int, max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut so that no shard exceeds the limit, except one that holds a single larger tensor."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * item_bytes
        if shards[-1] and shard_bytes + nbytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += nbytes
    return shards


def _random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Norms are ones; matrices are normal with the variance that keeps activations of order one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    tensor = torch.empty(shape, dtype=dtype, device=generator.device)
    return tensor.normal_(0.0, shape[1] ** -0.5, generator=generator).cpu()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(SUPPORTED_DTYPES))
    parser.add_argument("--schema", type=int, default=5, choices=(4, 5), help="transformers version of config.json")
    parser.add_argument("--max-shard-gb", "--max_shard_gb", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = shape_config(arguments.shape, arguments.layers)
    dtype = SUPPORTED_DTYPES[arguments.dtype]
    start = time.perf_counter()
    try:
        make_random_model(
            arguments.out, config, dtype, arguments.seed, int(arguments.max_shard_gb * 1e9), arguments.schema
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{arguments.out}: {config.num_parameters / 1e9:.2f} B random parameters,"
        f" {config.weight_bytes(dtype) / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s"
    )
    if (arguments.out / "tokenizer.json").is_file():
        print(f"tokenizer: the bundled model's, which knows fewer than the {config.vocab_size} ids of this shape")
    else:
        print("tokenizer: none, as the bundled model is not here; use token ids")
    return 0


if __name__ == "__main__":
    sys.exit(main())
