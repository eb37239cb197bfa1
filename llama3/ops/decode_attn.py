"""Decode attention on the GPU: one query token a sequence against its cached keys and values.

The kernels are `csrc/decode_attn/`; docs/decode-attention.md explains them. This file checks arguments, allocates, and
registers the torch ops `llama3::decode_attn` and `llama3::rope_append_decode`, which write into tensors that they are
given, so that torch.compile and CUDA graphs see plain mutating calls.

The cache is [num_blocks, num_kv_heads, 64, head_dim], in any strides with contiguous columns. Block t of row i is
`slots[i] * blocks_per_slot + t` (static cache; without `slots` row i is slot i), or `block_table[i, t]`.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from llama3.errors import UserError
from llama3.kv_cache import BLOCK_SIZE
from llama3.ops import one_kernel
from llama3.ops.tensor_error import wrong_tensor

VERSIONS = ("naive", "split", "tensor_core", "ring", "tma")  # the ladder of docs/decode-attention.md, slowest first
MAX_GROUP = 8
HEAD_DIMS = (64, 128)
DTYPES = {torch.bfloat16: 0, torch.float16: 1}  # the numbers of common::Dtype
ENOUGH_SMS = 0.95  # of all: with so many at work memory is as busy


def decode_attn(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    slots: torch.Tensor | None = None,
    blocks_per_slot: int = 0,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    version: str | None = None,
    pdl: bool = False,
    grid: int = 0,
    min_tiles: int = 0,
) -> torch.Tensor:
    """Attention of q [B, num_heads, head_dim] over the first context_lens[i] (int32 [B]) tokens of each row's cache.

    Returns out [B, num_heads, head_dim]; a row of length 0 is zero. `scale` defaults to head_dim ** -0.5. `lse`, if
    given, is fp32 [B, num_heads] and receives the natural-log sum of exponentials (-inf for length 0). `workspace` is
    one make_workspace(); calls that may run at the same time need different ones (by default there is one a stream, and
    one for all captured graphs). `version` names a step of VERSIONS (default: the fastest here), `grid` the number of
    thread blocks and `min_tiles` the least work of each (0: chosen here). `pdl` lets the launch overlap the previous
    kernel's end.

    Raises UserError naming the tensor and the shape expected; KernelBuildError if the kernels cannot be built.
    """
    shape = _cache_shape(k_cache, v_cache)
    if q.dim() != 3 or q.shape[2] != shape["head_dim"] or q.stride(2) != 1:
        raise _wrong("q", q, f"[batch, num_heads, {shape['head_dim']}] with contiguous columns")
    batch, num_heads = q.shape[0], q.shape[1]
    _check_heads(num_heads, shape["num_kv_heads"])
    _check_dtype("q", q, k_cache)
    _check_rows(batch, k_cache, context_lens, "context_lens", slots, blocks_per_slot, block_table)
    out = _output(out, q)
    if lse is not None and (
        tuple(lse.shape) != (batch, num_heads) or lse.dtype != torch.float32 or not lse.is_contiguous()
    ):
        raise _wrong("lse", lse, f"contiguous float32 [{batch}, {num_heads}]")
    _check_device(
        k_cache, q=q, v_cache=v_cache, context_lens=context_lens, slots=slots, block_table=block_table, out=out, lse=lse
    )
    scale = shape["head_dim"] ** -0.5 if scale is None else scale
    options = (_version(version), pdl, grid, min_tiles)
    torch.ops.llama3.decode_attn(
        q, k_cache, v_cache, context_lens, slots, blocks_per_slot, block_table, scale, out, lse, workspace, *options
    )
    return out


def rope_append_decode(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    slots: torch.Tensor | None = None,
    blocks_per_slot: int = 0,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    version: str | None = None,
    pdl: bool = False,
    grid: int = 0,
    min_tiles: int = 0,
) -> torch.Tensor:
    """One launch: rotate q and k, append k and v to the cache, attend to the cache with the new token.

    qkv is [B, (num_heads + 2 num_kv_heads) * head_dim]: all query heads, then all key heads, then all value heads. cos
    and sin are fp32 [max_position, head_dim / 2] (half-split layout). positions is int32 [B]: the index of the new
    token, which is the number of tokens in the row's cache; the row's blocks must reach it. A row with position < 0 is
    inactive: its output is zero and nothing is appended. Returns out [B, num_heads * head_dim]. Other arguments as in
    decode_attn; only the versions "ring" and "tma" exist.

    With `pdl`, positions, slots, block_table and the cached tokens are read before the previous kernel has ended: they
    must have been written by an earlier one, and the previous kernel must not be decode attention itself, which lets
    its successor start at once.
    """
    shape = _cache_shape(k_cache, v_cache)
    head_dim, num_kv_heads = shape["head_dim"], shape["num_kv_heads"]
    if qkv.dim() != 2 or qkv.shape[1] % head_dim or qkv.shape[1] // head_dim <= 2 * num_kv_heads or qkv.stride(1) != 1:
        raise _wrong("qkv", qkv, f"[batch, (num_heads + 2 * {num_kv_heads}) * {head_dim}] with contiguous columns")
    batch, num_heads = qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv_heads
    _check_heads(num_heads, num_kv_heads)
    _check_dtype("qkv", qkv, k_cache)
    for name, table in (("cos", cos), ("sin", sin)):
        if (
            table.dim() != 2
            or table.shape[1] != head_dim // 2
            or table.dtype != torch.float32
            or not table.is_contiguous()
        ):
            raise _wrong(name, table, f"contiguous float32 [max_position, {head_dim // 2}]")
    _check_rows(batch, k_cache, positions, "positions", slots, blocks_per_slot, block_table)
    if out is None:
        out = qkv.new_empty(batch, num_heads * head_dim)
    if tuple(out.shape) != (batch, num_heads * head_dim) or out.dtype != qkv.dtype or out.stride(1) != 1:
        raise _wrong("out", out, f"{qkv.dtype} [{batch}, {num_heads * head_dim}] with contiguous columns")
    _check_device(
        k_cache,
        qkv=qkv,
        v_cache=v_cache,
        cos=cos,
        sin=sin,
        positions=positions,
        slots=slots,
        block_table=block_table,
        out=out,
    )
    scale = head_dim**-0.5 if scale is None else scale
    options = (_version(version), pdl, grid, min_tiles)
    torch.ops.llama3.rope_append_decode(
        qkv, cos, sin, k_cache, v_cache, positions, slots, blocks_per_slot, block_table, scale, out, workspace, *options
    )
    return out


def make_workspace(device: torch.device | str = "cuda") -> torch.Tensor:
    """Scratch for one caller at a time on `device`: fp32 partials (int32 bit patterns) in two buffers, of which every
    launch empties the one that the next will use; see csrc/decode_attn/merge.cuh."""
    device = torch.device(device)
    words = library().workspace_floats(VERSIONS.index("tma"), 1, 1, 1, 128, one_kernel.num_sms(device))
    workspace = torch.full((words,), _signed(library().empty_word), dtype=torch.int32, device=device)
    workspace.view(-1, library().range_floats)[:, 2 * library().partial_floats :] = 0  # the number of launches
    return workspace


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("decode_attn")


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def choose_grid(num_units: int, num_sms: int) -> int:
    """Blocks for so many pairs of row and kv head: one a multiprocessor, or one a pair if they are nearly as many.
    Rows of equal length are then cut nowhere, and no partial results merged."""
    return num_units if num_sms * ENOUGH_SMS <= num_units <= num_sms else num_sms


@functools.cache
def max_batch(head_dim: int, device: torch.device) -> int:
    """The most rows of one call: each takes some shared memory of every block."""
    properties = torch.cuda.get_device_properties(device)
    return library().max_batch(head_dim, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@functools.cache
def _best_version(device: torch.device) -> int:
    return VERSIONS.index("tma" if torch.cuda.get_device_capability(device)[0] == 9 else "ring")


_workspaces: dict[tuple[torch.device, int | str], torch.Tensor] = {}


def _workspace(device: torch.device) -> torch.Tensor:
    """The default workspace of the current stream, or the one that all captured graphs of the device share."""
    capturing = torch.cuda.is_current_stream_capturing()
    key = (device, "capture" if capturing else torch.cuda.current_stream(device).cuda_stream)
    if key not in _workspaces:
        if capturing:  # an allocation now would belong to the graph
            raise UserError(
                "decode attention was captured before its first run: run it once, or pass workspace=make_workspace()"
            )
        _workspaces[key] = make_workspace(device)
        _workspaces.setdefault((device, "capture"), make_workspace(device))
    return _workspaces[key]


# ---- checks: shapes only, so that they run on any device and under torch.compile


_wrong = functools.partial(wrong_tensor, "decode attention")


def _cache_shape(k_cache: torch.Tensor, v_cache: torch.Tensor) -> dict[str, int]:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape[2] != BLOCK_SIZE or cache.shape[3] not in HEAD_DIMS or cache.stride(3) != 1:
            raise _wrong(name, cache, f"[num_blocks, num_kv_heads, {BLOCK_SIZE}, 64 or 128] with contiguous columns")
        if any(stride % 8 for stride in cache.stride()[:3]):
            raise _wrong(name, cache, "strides that are multiples of 8 elements (16 bytes)")
        if cache.dtype not in DTYPES:
            raise _wrong(name, cache, "bfloat16 or float16")
    if v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype:
        raise _wrong("v_cache", v_cache, f"{k_cache.dtype} {list(k_cache.shape)} like k_cache")
    return {"num_kv_heads": k_cache.shape[1], "head_dim": k_cache.shape[3]}


def _check_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads or not 1 <= num_heads // num_kv_heads <= MAX_GROUP:
        raise UserError(
            f"decode attention: {num_heads} query heads over {num_kv_heads} kv heads; "
            f"expected 1 to {MAX_GROUP} times as many"
        )


def _check_dtype(name: str, tensor: torch.Tensor, k_cache: torch.Tensor) -> None:
    if tensor.dtype != k_cache.dtype:
        raise _wrong(name, tensor, f"{k_cache.dtype} like k_cache")
    if any(stride % 2 for stride in tensor.stride()[:-1]):
        raise _wrong(name, tensor, "even strides")


def _check_rows(
    batch: int,
    k_cache: torch.Tensor,
    lengths: torch.Tensor,
    name: str,
    slots: torch.Tensor | None,
    blocks_per_slot: int,
    block_table: torch.Tensor | None,
) -> None:
    if batch < 1:
        raise UserError("decode attention: the batch is empty")
    for label, tensor in ((name, lengths), ("slots", slots)):
        if tensor is not None and (
            tuple(tensor.shape) != (batch,) or tensor.dtype != torch.int32 or tensor.stride(0) != 1
        ):
            raise _wrong(label, tensor, f"contiguous int32 [{batch}]")
    if block_table is not None:
        if slots is not None or blocks_per_slot:
            raise UserError("decode attention: give slots and blocks_per_slot, or block_table, not both")
        if (
            block_table.dim() != 2
            or block_table.shape[0] != batch
            or block_table.dtype != torch.int32
            or block_table.stride(1) != 1
        ):
            raise _wrong("block_table", block_table, f"int32 [{batch}, max_blocks] with contiguous columns")
    elif blocks_per_slot < 1:
        raise UserError(
            f"decode attention: blocks_per_slot is {blocks_per_slot}; without a block_table it must be at least 1"
        )
    elif slots is None and batch * blocks_per_slot > k_cache.shape[0]:
        raise _wrong("k_cache", k_cache, f"at least {batch} slots x {blocks_per_slot} blocks")


def _output(out: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    if out is None:
        return q.new_empty(q.shape)
    if (
        out.shape != q.shape
        or out.dtype != q.dtype
        or out.stride(2) != 1
        or any(stride % 2 for stride in out.stride()[:2])
    ):
        raise _wrong("out", out, f"{q.dtype} {list(q.shape)} with contiguous columns")
    return out


def _check_device(reference: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    if reference.device.type not in ("cuda", "meta"):
        raise UserError(f"decode attention: k_cache is on {reference.device}; the kernels need a CUDA device")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise UserError(f"decode attention: {name} is on {tensor.device}, k_cache on {reference.device}")


def _version(version: str | None) -> int:
    if version is None:
        return -1
    if version not in VERSIONS:
        raise UserError(f"decode attention: version {version!r} is unknown; choose from {', '.join(VERSIONS)}")
    return VERSIONS.index(version)


# ---- the torch ops

_ROWS = "Tensor? slots, int blocks_per_slot, Tensor? block_table, float scale, Tensor(a!) out"
_OPTIONS = "Tensor(w!)? workspace, int version, bool pdl, int grid, int min_tiles"
torch.library.define(
    "llama3::decode_attn",
    f"(Tensor q, Tensor k_cache, Tensor v_cache, Tensor context_lens, {_ROWS}, Tensor(l!)? lse, {_OPTIONS}) -> ()",
)
torch.library.define(
    "llama3::rope_append_decode",
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor(k!) k_cache, Tensor(v!) v_cache, Tensor positions, "
    f"{_ROWS}, {_OPTIONS}) -> ()",
)


@torch.library.register_fake("llama3::decode_attn")
def _decode_attn_fake(*args: object) -> None:
    pass  # only mutates


@torch.library.register_fake("llama3::rope_append_decode")
def _rope_append_decode_fake(*args: object) -> None:
    pass


@torch.library.impl("llama3::decode_attn", "CUDA")
def _decode_attn_cuda(
    q, k_cache, v_cache, context_lens, slots, blocks_per_slot, block_table, scale, out, lse, workspace, *options
):
    _launch(
        k_cache, v_cache, context_lens, slots, blocks_per_slot, block_table, scale, workspace, options,
        q=q.data_ptr(), q_strides=q.stride()[:2], out=out.data_ptr(), out_strides=out.stride()[:2],
        lse=_pointer(lse), cos=0, sin=0, batch=q.shape[0], num_heads=q.shape[1],
    )  # fmt: skip


@torch.library.impl("llama3::rope_append_decode", "CUDA")
def _rope_append_decode_cuda(
    qkv, cos, sin, k_cache, v_cache, positions, slots, blocks_per_slot, block_table, scale, out, workspace, *options
):
    head_dim = k_cache.shape[3]
    _launch(
        k_cache, v_cache, positions, slots, blocks_per_slot, block_table, scale, workspace, options,
        q=qkv.data_ptr(), q_strides=(qkv.stride(0), head_dim),
        out=out.data_ptr(), out_strides=(out.stride(0), head_dim), lse=0,
        cos=cos.data_ptr(), sin=sin.data_ptr(), batch=qkv.shape[0], num_heads=out.shape[1] // head_dim,
    )  # fmt: skip


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(
    k_cache, v_cache, lengths, slots, blocks_per_slot, block_table, scale, workspace, options, **arguments
) -> None:
    version, pdl, grid, min_tiles = options
    device = k_cache.device
    version = _best_version(device) if version < 0 else version
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    grid = grid or choose_grid(arguments["batch"] * num_kv_heads, one_kernel.num_sms(device))
    needed = library().workspace_floats(
        version, arguments["batch"], arguments["num_heads"], num_kv_heads, head_dim, grid
    )
    if version < VERSIONS.index("ring"):  # these need no empty words, but as many as the batch asks for
        workspace = torch.empty(needed, dtype=torch.int32, device=device)
    elif workspace is None:
        workspace = _workspace(device)
    if workspace.dtype != torch.int32 or workspace.numel() < needed or workspace.device != device:
        raise _wrong("workspace", workspace, f"make_workspace({str(device)!r}), {needed} words for a grid of {grid}")
    with torch.cuda.device(device):
        library().decode(
            **arguments,
            k_cache=k_cache.data_ptr(),
            k_strides=k_cache.stride()[:3],
            v_cache=v_cache.data_ptr(),
            v_strides=v_cache.stride()[:3],
            lengths=lengths.data_ptr(),
            slots=_pointer(slots),
            blocks_per_slot=blocks_per_slot if block_table is None else block_table.shape[1],
            block_table=_pointer(block_table),
            table_stride=0 if block_table is None else block_table.stride(0),
            partials=workspace.data_ptr(),
            partials_size=workspace.numel(),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_blocks=k_cache.shape[0],
            scale=scale,
            dtype=DTYPES[k_cache.dtype],
            grid=grid,
            min_tiles=min_tiles or 1,
            version=version,
            pdl=pdl,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
