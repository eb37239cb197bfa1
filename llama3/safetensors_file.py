"""The header of a safetensors file: which tensor lies where.

Layout (https://github.com/huggingface/safetensors): 8 bytes of header length n (little endian), n bytes of JSON
{name: {dtype, shape, data_offsets}}, then the data without holes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from llama3.errors import CheckpointError

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
GIT_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: `nbytes` bytes from byte `offset` of the file `path`; `dtype` is spelled as in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of `path` by name. Raises CheckpointError if the file is not exactly what its header describes."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS_POINTER))
            if start == GIT_LFS_POINTER:
                raise CheckpointError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
            header_bytes = int.from_bytes(start[:8], "little")
            data_start = 8 + header_bytes
            if data_start > file_bytes or header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: truncated, or not a safetensors file ({file_bytes} bytes)")
            file.seek(8)
            header = file.read(header_bytes)
    except OSError as reason:
        raise CheckpointError(f"{path}: cannot be read ({reason.strerror})") from None
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _stored_tensor(name, entry, path, data_start) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as reason:
        raise CheckpointError(f"{path}: the safetensors header is corrupt ({reason})") from None
    _check_layout(path, tensors, data_start, file_bytes)
    return tensors


def _stored_tensor(name: str, entry: dict, path: Path, data_start: int) -> StoredTensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    # The size of a type that this table lacks is not checked here; no such type is ever loaded.
    if dtype in ITEM_BYTES and end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name}: {dtype} {list(shape)} does not take {end - begin} bytes")
    return StoredTensor(name, dtype, shape, path, data_start + begin, end - begin)


def _check_layout(path: Path, tensors: dict[str, StoredTensor], data_start: int, file_bytes: int) -> None:
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: the safetensors header is corrupt ({tensor.name} overlaps or leaves a hole)"
            )
        end += tensor.nbytes
    if file_bytes < end:
        raise CheckpointError(f"{path}: truncated, {file_bytes} bytes of {end}; copy or download it again")
    if file_bytes > end:
        raise CheckpointError(f"{path}: {file_bytes - end} bytes too long; copy or download it again")
