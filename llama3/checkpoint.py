"""safetensors files of a Hugging Face folder -> packed parameters on the device.

Strict: every tensor of the files but rotary tables is used exactly once, and everything is checked against the config
before any memory is allocated. Only NaN and Inf are found later, on the device; then the load raises too: nothing
half-loaded gets out. The files may hold any of the three float types; the values are cast to the asked one, as
transformers does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from llama3.config import ModelConfig
from llama3.errors import CheckpointError
from llama3.json_file import JsonObject, read_json_object
from llama3.safetensors_file import StoredTensor, read_header
from llama3.tensor_stream import CHUNK_BYTES, FileRange, stream_ranges
from llama3.weights import ModelWeights, empty_weights, gate_up_groups

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROTARY_TABLE = ".rotary_emb.inv_freq"
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Target:
    """Where one tensor of the files goes.

    `view` takes the elements in the tensor's order, but may be strided and may fold the rows into groups. It is written
    in runs of whole entries of its first dimension.
    """

    shape: tuple[int, ...]  # as in the file
    view: torch.Tensor
    compare: bool = False  # only compare with what the view already holds


def load_weights(
    folder: Path,
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> ModelWeights:
    """The weights of `folder` on `device` in `dtype` (default: the config's).

    Host memory: a fixed ring of staging buffers (256 MiB), whatever the size of the shards. `progress` draws a bar with
    the rate on stderr. Raises CheckpointError, naming the file and the tensor.
    """
    device, dtype = torch.device(device), dtype or config.dtype
    stored = _as_in_the_model(find_tensors(Path(folder)), config)
    _check(stored, tensor_targets(empty_weights(config, "meta", dtype), config), Path(folder))
    weights = empty_weights(config, device, dtype)
    _fill(tensor_targets(weights, config), stored, device, progress)
    return weights


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, from `model.safetensors` or else from the shards that the index names.

    Other files, such as `original/` or a second copy in another format, are not looked at.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = JsonObject(read_json_object(index, CheckpointError), str(index), CheckpointError).object("weight_map")
    for name, file in weight_map.values.items():
        if not isinstance(file, str) or Path(file).name != file:
            weight_map.fail(name, f"is {file!r}; the name of a file in the same folder is needed")
    files = sorted(set(weight_map.values.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise CheckpointError(f"{folder}: {_count(absent, 'shard')} of {len(files)} missing: {_listing(absent)}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: {name} lies in both {tensors[name].path.name} and {file}")
            tensors[name] = tensor
    for name, file in weight_map.values.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError(f"{folder}: {INDEX_FILE} says that {name} lies in {file}, but it does not")
    unlisted = sorted(tensors.keys() - weight_map.values.keys())
    if unlisted:
        raise CheckpointError(
            f"{folder}: {INDEX_FILE} does not list {_count(unlisted, 'tensor')}: {_listing(unlisted)}"
        )
    return tensors


def _as_in_the_model(stored: dict[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """Without rotary tables, which old converters wrote and we compute; a matrix that embedding and head share may be
    stored under either name."""
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(ROTARY_TABLE)}
    if config.tie_word_embeddings and EMBED not in stored and HEAD in stored:
        stored[EMBED] = replace(stored.pop(HEAD), name=EMBED)
    return stored


def tensor_targets(weights: ModelWeights, config: ModelConfig) -> dict[str, Target]:
    """Hugging Face name -> place in the packed parameters, in forward order. Works on meta tensors too."""
    q_size, kv_size, hidden = config.q_size, config.kv_size, config.hidden_size
    targets = {EMBED: _whole(weights.embed)}
    for number, layer in enumerate(weights.layers):
        query, key, value = layer.qkv.split([q_size, kv_size, kv_size])
        groups = gate_up_groups(layer.gate_up)
        assert layer.attn_norm is not None and layer.mlp_norm is not None  # they are folded in after the load
        feed_forward = (config.intermediate_size, hidden)
        parts = {
            "input_layernorm": _whole(layer.attn_norm),
            "self_attn.q_proj": _whole(query),
            "self_attn.k_proj": _whole(key),
            "self_attn.v_proj": _whole(value),
            "self_attn.o_proj": _whole(layer.o),
            "post_attention_layernorm": _whole(layer.mlp_norm),
            "mlp.gate_proj": Target(feed_forward, groups[:, 0]),
            "mlp.up_proj": Target(feed_forward, groups[:, 1]),
            "mlp.down_proj": _whole(layer.down),
        }
        targets.update({f"model.layers.{number}.{part}.weight": target for part, target in parts.items()})
    targets["model.norm.weight"] = _whole(weights.final_norm)
    # Some tied folders store the head a second time. It must then say the same, or the flag in config.json is wrong.
    targets[HEAD] = Target(tuple(weights.lm_head.shape), weights.lm_head, compare=config.tie_word_embeddings)
    return targets


def _whole(parameter: torch.Tensor) -> Target:
    return Target(tuple(parameter.shape), parameter)


def _check(stored: dict[str, StoredTensor], targets: dict[str, Target], folder: Path) -> None:
    """Names, types and shapes, all of them, so that one run shows everything that is wrong."""
    required = [name for name, target in targets.items() if not target.compare]
    missing = [name for name in required if name not in stored]
    unused = [name for name in stored if name not in targets]
    problems = []
    if missing:
        problems.append(f"{_count(missing, 'tensor')} missing: {_listing(missing)}")
    if unused:
        files = sorted({stored[name].path.name for name in unused})
        problems.append(f"{_count(unused, 'tensor')} not part of the model: {_listing(unused)} in {_listing(files)}")
    wrong = []
    for name, target in targets.items():
        tensor = stored.get(name)
        if tensor and tensor.dtype not in FLOAT_TYPES:
            wrong.append(
                f"{name} in {tensor.path.name} has dtype {tensor.dtype}, supported are {', '.join(FLOAT_TYPES)}"
            )
        if tensor and tensor.shape != target.shape:
            needed = list(target.shape)
            wrong.append(f"{name} in {tensor.path.name} has shape {list(tensor.shape)}, config.json needs {needed}")
    if wrong:
        problems.append(_listing(wrong))
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")


@dataclass(frozen=True)
class _Chunk:
    """Entries `start` to `stop` of the first dimension of a target's view, and the file range that holds them."""

    tensor: StoredTensor
    target: Target
    start: int
    stop: int
    range: FileRange


def _chunks(tensor: StoredTensor, target: Target) -> list[_Chunk]:
    entries = target.view.shape[0]
    entry_bytes = tensor.nbytes // entries
    step = max(1, CHUNK_BYTES // entry_bytes)
    chunks = []
    for start in range(0, entries, step):
        stop = min(start + step, entries)
        place = FileRange(tensor.path, tensor.offset + start * entry_bytes, (stop - start) * entry_bytes)
        chunks.append(_Chunk(tensor, target, start, stop, place))
    return chunks


def _fill(targets: dict[str, Target], stored: dict[str, StoredTensor], device: torch.device, progress: bool) -> None:
    """Stream every stored tensor into its target: one pass, in file order; what is only compared comes last."""
    order = sorted(stored.values(), key=lambda tensor: (targets[tensor.name].compare, tensor.path, tensor.offset))
    chunks = [chunk for tensor in order for chunk in _chunks(tensor, targets[tensor.name])]
    extremes, differences = [], []  # on the device, looked at once at the end: a read here would stop the pipeline
    total = sum(chunk.range.nbytes for chunk in chunks)
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for chunk, data in zip(chunks, stream_ranges([chunk.range for chunk in chunks], device), strict=True):
            part = chunk.target.view[chunk.start : chunk.stop]
            values = data.view(FLOAT_TYPES[chunk.tensor.dtype]).to(part.dtype).view(part.shape)
            if chunk.target.compare:
                differences.append((part != values).any())
            else:
                part.copy_(values)
                extremes.append(torch.stack(torch.aminmax(values)))  # a NaN anywhere makes both NaN
            bar.update(chunk.range.nbytes)
        _raise_if_not_finite([chunk for chunk in chunks if not chunk.target.compare], extremes)
    if differences and bool(torch.stack(differences).any()):
        raise CheckpointError(
            f"{stored[HEAD].path}: {HEAD} differs from {EMBED}, but tie_word_embeddings is true in config.json;"
            " set it to false if this head is meant to be used"
        )


def _raise_if_not_finite(chunks: Sequence[_Chunk], extremes: Sequence[torch.Tensor]) -> None:
    finite = torch.stack(list(extremes)).isfinite().all(dim=1).tolist()  # waits for the device
    bad = {chunk.tensor.name: chunk.tensor.path.name for chunk, good in zip(chunks, finite, strict=True) if not good}
    if bad:
        dtype = str(extremes[0].dtype).removeprefix("torch.")
        files = _listing(sorted(set(bad.values())))
        raise CheckpointError(
            f"{chunks[0].tensor.path.parent}: NaN or Inf (as {dtype}) in {_count(list(bad), 'tensor')}:"
            f" {_listing(list(bad))} in {files}"
        )


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def _listing(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
