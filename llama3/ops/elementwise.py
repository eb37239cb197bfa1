"""The elementwise kernels of `csrc/elementwise/`, each one pass over its data. Checks, allocation and launch.

Every function raises UserError naming the tensor and the shape expected, and KernelBuildError if the kernels cannot be
built. Tensors are contiguous bf16 or fp16 on one CUDA device unless stated.
"""

import functools
from types import ModuleType

import torch

from llama3.errors import UserError
from llama3.kv_cache import BLOCK_SIZE, LayerCache
from llama3.ops.tensor_error import check_tensors, wrong_tensor
from llama3.rope import RopeTable

DTYPES = {torch.bfloat16: 0, torch.float16: 1}  # the numbers of common::Dtype


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("elementwise")


def embed(token_ids: torch.Tensor, table: torch.Tensor, with_squares: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """token_ids int64 [T], table [V, H] -> [T, H], and if asked for its sum_squares. Ids must be rows of the table."""
    num_tokens, hidden_size = token_ids.numel(), table.shape[-1]
    _check("embed", table, table=(table, (*table.shape[:1], hidden_size)))
    check_tensors("embed", table.device, torch.int64, token_ids=(token_ids, (num_tokens,)))
    out = table.new_empty(num_tokens, hidden_size)
    squares = table.new_empty((1, num_tokens), dtype=torch.float32) if with_squares else None
    pointers = (t.data_ptr() for t in (token_ids, table, out))
    sums = 0 if squares is None else squares.data_ptr()
    library().embed(*pointers, sums, num_tokens, hidden_size, DTYPES[table.dtype], *_launch(table))
    return out, squares


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x [T, H], weight [H] or None -> [T, H]; fp32 inside, rounded, then times the weight."""
    if x.dim() != 2:
        raise wrong_tensor("rms_norm", "x", x, "[T, H]")
    num_rows, hidden_size = x.shape
    weights = {} if weight is None else {"weight": (weight, (hidden_size,))}
    _check("rms_norm", x, x=(x, (num_rows, hidden_size)), **weights)
    out = torch.empty_like(x)
    pointers = (x.data_ptr(), 0 if weight is None else weight.data_ptr(), out.data_ptr())
    library().rms_norm(*pointers, num_rows, hidden_size, eps, DTYPES[x.dtype], *_launch(x))
    return out


def sum_squares(x: torch.Tensor) -> torch.Tensor:
    """x [T, H] -> fp32 [1, T], which products take in place of a norm before them."""
    if x.dim() != 2:
        raise wrong_tensor("sum_squares", "x", x, "[T, H]")
    num_rows, hidden_size = x.shape
    _check("sum_squares", x, x=(x, (num_rows, hidden_size)))
    squares = x.new_empty((1, num_rows), dtype=torch.float32)
    sizes = (num_rows, hidden_size, 0.0, DTYPES[x.dtype])
    library().rms_norm(x.data_ptr(), 0, 0, *sizes, *_launch(x), squares=squares.data_ptr())
    return squares


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """The packed projection [T, 2 F] in groups of 8 gates and their 8 ups -> silu(gate) * up, [T, F]."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 16:
        raise wrong_tensor("silu_mul", "gate_up", gate_up, "[T, 2 F] with F a multiple of 8")
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    _check("silu_mul", gate_up, gate_up=(gate_up, tuple(gate_up.shape)))
    out = gate_up.new_empty(num_rows, size)
    library().silu_mul(gate_up.data_ptr(), out.data_ptr(), num_rows, size, DTYPES[gate_up.dtype], *_launch(gate_up))
    return out


def rope_append(
    qkv: torch.Tensor, rope: RopeTable, cache: LayerCache, slots: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Rotate q and k, and store k and v in the cache: what comes before attention in a prefill.

    qkv [T, (Hq + 2 Hkv) D], all q heads, then all k heads, then all v heads; slots and positions int64 [T]. Returns the
    rotated q and k heads, [T, Hq + Hkv, D]. A token of negative position is stored nowhere.
    """
    num_tokens, num_heads = check_projection("rope_append", qkv, rope, cache, slots, positions)
    num_kv_heads, head_dim = cache.k.shape[1], cache.k.shape[3]
    rotated = qkv.new_empty(num_tokens, num_heads + num_kv_heads, head_dim)
    pointers = (t.data_ptr() for t in (qkv, rope.cos, rope.sin, slots, positions, rotated, cache.k, cache.v))
    sizes = (num_tokens, num_heads, num_kv_heads, head_dim, cache.blocks_per_slot)
    library().rope_append(*pointers, *sizes, DTYPES[qkv.dtype], *_launch(qkv))
    return rotated


def gather_cache(
    cache: LayerCache, slots: torch.Tensor, starts: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first starts[i + 1] - starts[i] tokens of slot slots[i], for all i end to end: k, v [num_tokens, Hkv, D].

    slots int32 [B], starts int32 [B + 1]; num_tokens is the last of starts, known on the host.
    """
    num_kv_heads, head_dim = cache.k.shape[1], cache.k.shape[3]
    _check("gather_cache", cache.k, **_cache_shapes(cache))
    sequences = {"slots": (slots, (slots.numel(),)), "starts": (starts, (slots.numel() + 1,))}
    check_tensors("gather_cache", cache.k.device, torch.int32, **sequences)
    k, v = cache.k.new_empty(2, num_tokens, num_kv_heads, head_dim).unbind()
    pointers = (t.data_ptr() for t in (cache.k, cache.v, slots, starts, k, v))
    sizes = (slots.numel(), num_tokens, num_kv_heads, head_dim, cache.blocks_per_slot)
    library().gather_cache(*pointers, *sizes, _launch(cache.k)[1])
    return k, v


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether kernels may be launched before their predecessor has ended (compute capability 9.0 and newer)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(tensor: torch.Tensor) -> tuple[bool, int]:
    return can_overlap(tensor.device), torch.cuda.current_stream(tensor.device).cuda_stream


def check_projection(
    op: str, qkv: torch.Tensor, rope: RopeTable, cache: LayerCache, slots: torch.Tensor, positions: torch.Tensor
) -> tuple[int, int]:
    """T and Hq of a packed projection of prompts; UserError if it or what goes with it are not as in rope_append."""
    num_kv_heads, head_dim = cache.k.shape[1], cache.k.shape[3]
    if qkv.dim() != 2 or qkv.shape[1] % head_dim or qkv.shape[1] // head_dim <= 2 * num_kv_heads:
        raise wrong_tensor(op, "qkv", qkv, f"[T, (Hq + 2 * {num_kv_heads}) * {head_dim}]")
    num_tokens, table = qkv.shape[0], (rope.cos.shape[0], head_dim // 2)
    _check(op, qkv, qkv=(qkv, tuple(qkv.shape)), **_cache_shapes(cache))
    check_tensors(op, qkv.device, torch.float32, cos=(rope.cos, table), sin=(rope.sin, table))
    check_tensors(op, qkv.device, torch.int64, slots=(slots, (num_tokens,)), positions=(positions, (num_tokens,)))
    return num_tokens, qkv.shape[1] // head_dim - 2 * num_kv_heads


def _cache_shapes(cache: LayerCache) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    shape = (cache.k.shape[0], cache.k.shape[1], BLOCK_SIZE, cache.k.shape[3])
    return {"k_cache": (cache.k, shape), "v_cache": (cache.v, shape)}


def _check(op: str, reference: torch.Tensor, **expected: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    if reference.dtype not in DTYPES:
        raise UserError(f"{op}: the kernels compute in bfloat16 or float16, not in {reference.dtype}")
    check_tensors(op, reference.device, reference.dtype, **expected)
