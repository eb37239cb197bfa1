"""Decode attention on one GPU, measured fairly: ours beside FA2, FA3 and FlashInfer on the same cold bytes.

A case is timed inside a CUDA graph that walks over several caches, together larger than any L2, so every call finds its
cache in DRAM. A figure is the graph's time over its calls, so it holds the launch gap, for every kernel alike. Ours is
launched as the engine does, and FlashInfer by default too: with programmatic dependent launch where the GPU has it. The
kernels of a case take turns, replay by replay in an order drawn anew, and the median counts. Each result is compared
with fp32 first.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.graph_timing import capture, replay_seconds
from benchmarks.peaks import H200_READ_BANDWIDTH
from llama3.ops import decode_attn as ops
from llama3.ops.elementwise import can_overlap

READ_CEILING = H200_READ_BANDWIDTH
ROTATED_BYTES = 1 << 30
MAX_ERROR = 6e-3  # relative, against fp32; one bfloat16 rounding of the output alone is 1.7e-3
PAGE = 16  # of the peers' paged caches


@dataclass(frozen=True)
class Shape:
    """One case: bfloat16, one query token a row. `ragged` replaces batch x context by a list of lengths."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int
    context: int
    ragged: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        return list(self.ragged) or [self.context] * self.batch

    @property
    def kv_bytes(self) -> int:
        return 4 * sum(self.lengths) * self.num_kv_heads * self.head_dim

    @property
    def label(self) -> str:
        work = "1 x 64k + 31 x 4k" if self.ragged else f"{self.batch} x {self.context}"
        return f"{self.num_heads}/{self.num_kv_heads}, {self.head_dim}: {work}"


def _shapes(num_heads: int, num_kv_heads: int, head_dim: int, cases: list[tuple[int, int]]) -> list[Shape]:
    return [Shape(num_heads, num_kv_heads, head_dim, *case) for case in cases]


BATCH_1 = [(1, 256), (1, 2048), (1, 8192), (1, 32768), (1, 131072)]
COMMON = [*BATCH_1, (16, 2048), (16, 4096), (64, 1024), (64, 4096), (256, 256), (256, 2048)]
SUITE = [
    *_shapes(32, 8, 64, COMMON),
    *_shapes(32, 8, 128, COMMON),
    *_shapes(24, 8, 128, [(1, 2048), (64, 4096)]),
    *_shapes(64, 8, 128, [(1, 32768), (64, 4096)]),
    *_shapes(32, 8, 128, [(17, 4096), (20, 4096)]),
    Shape(32, 8, 128, 32, 0, (65536, *[4096] * 31)),
]
LADDER = [
    *_shapes(32, 8, 64, [(1, 2048), (64, 1024)]),
    *_shapes(32, 8, 128, [(1, 2048), (1, 32768), (16, 2048), (64, 1024)]),
]

Call = Callable[[], torch.Tensor]


@dataclass
class Inputs:
    """Random caches of one shape. The same bytes are read as blocks of 64 by us and as sequences by the peers."""

    shape: Shape
    copies: int
    q: torch.Tensor = field(init=False)  # [batch, num_heads, head_dim]
    k: list[torch.Tensor] = field(init=False)  # [blocks, num_kv_heads, 64, head_dim] each
    v: list[torch.Tensor] = field(init=False)
    lengths: torch.Tensor = field(init=False)
    starts: list[int] = field(init=False)  # first block of each row

    def __post_init__(self) -> None:
        s = self.shape
        blocks = [-(-n // ops.BLOCK_SIZE) for n in s.lengths]
        self.starts = [sum(blocks[:i]) for i in range(len(blocks))]
        size = (sum(blocks), s.num_kv_heads, ops.BLOCK_SIZE, s.head_dim)
        self.k, self.v = (
            [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(self.copies)] for _ in range(2)
        )
        self.q = torch.randn(len(blocks), s.num_heads, s.head_dim, device="cuda", dtype=torch.bfloat16)
        self.lengths = torch.tensor(s.lengths, dtype=torch.int32, device="cuda")
        self.table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        for row, (start, count) in enumerate(zip(self.starts, blocks, strict=True)):
            self.table[row, :count] = torch.arange(start, start + count)
        self.table = self.table.cuda()
        self.rows: dict = {"block_table": self.table} if s.ragged else {"blocks_per_slot": blocks[0]}

    def truth(self, blocked: bool) -> torch.Tensor:
        """fp32 attention over the first copy, row by row; `blocked`: our layout, else the peers'."""
        s, out = self.shape, torch.empty(self.q.shape, device="cuda")
        for row, (start, n) in enumerate(zip(self.starts, s.lengths, strict=True)):
            pair = [c[0][start : start - (-n // ops.BLOCK_SIZE)] for c in (self.k, self.v)]
            if blocked:
                k, v = (x.transpose(0, 1).flatten(1, 2)[:, :n].float() for x in pair)
            else:
                k, v = (x.reshape(-1, s.num_kv_heads, s.head_dim)[:n].transpose(0, 1).float() for x in pair)
            scores = self.q[row].float().view(s.num_kv_heads, -1, s.head_dim) @ k.transpose(1, 2) * s.head_dim**-0.5
            out[row] = (torch.softmax(scores, -1) @ v).view(s.num_heads, s.head_dim)
        return out


def _over_copies(call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], inputs: Inputs) -> list[Call]:
    return [partial(call, k, v) for k, v in zip(inputs.k, inputs.v, strict=True)]


def ours(inputs: Inputs, **options) -> list[Call]:
    """Our kernel over every copy; options as of decode_attn, but for `pdl`, which is on where the GPU has it."""
    rows = options.pop("rows", inputs.rows)
    options.setdefault("pdl", can_overlap(inputs.q.device))
    workspace, out = ops.make_workspace(), torch.empty_like(inputs.q)

    def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.decode_attn(inputs.q, k, v, inputs.lengths, **rows, out=out, workspace=workspace, **options)

    return _over_copies(call, inputs)


def fused(inputs: Inputs) -> list[Call]:
    """The fused form: rotate, append the last token, attend. Not compared here: it overwrites the caches."""
    s = inputs.shape
    positions = inputs.lengths - 1
    cos = torch.ones(max(s.lengths), s.head_dim // 2, device="cuda")
    sin = torch.zeros_like(cos)
    qkv = torch.randn(
        len(s.lengths), (s.num_heads + 2 * s.num_kv_heads) * s.head_dim, device="cuda", dtype=torch.bfloat16
    )
    out = qkv.new_empty(len(s.lengths), s.num_heads * s.head_dim)
    workspace = ops.make_workspace()

    def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.rope_append_decode(
            qkv, cos, sin, k, v, positions, **inputs.rows, out=out, workspace=workspace, pdl=can_overlap(qkv.device)
        )

    return _over_copies(call, inputs)


def fa2(inputs: Inputs) -> list[Call]:
    """FlashAttention 2 as PyTorch ships it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    s = inputs.shape
    q = inputs.q[:, :, None]

    def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        size = (s.batch, s.context, s.num_kv_heads, s.head_dim)
        k, v = k.view(size).transpose(1, 2), v.view(size).transpose(1, 2)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]

    return _over_copies(call, inputs)


def _paged(inputs: Inputs, cache: torch.Tensor) -> torch.Tensor:
    return cache.view(-1, PAGE, inputs.shape.num_kv_heads, inputs.shape.head_dim)


def fa3(inputs: Inputs) -> list[Call]:
    """FlashAttention 3 as vLLM ships it, paged."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    batch, longest = len(inputs.starts), max(inputs.shape.lengths)
    per_block = ops.BLOCK_SIZE // PAGE
    pages = (inputs.table[:, :, None] * per_block + torch.arange(per_block, device="cuda", dtype=torch.int32)).flatten(
        1
    )
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32)

    def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_varlen_func(
            inputs.q, _paged(inputs, k), _paged(inputs, v), max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=longest,
            seqused_k=inputs.lengths, block_table=pages, causal=True, fa_version=3,
        )  # fmt: skip

    return _over_copies(call, inputs)


def flashinfer(inputs: Inputs) -> list[Call]:
    """FlashInfer's decode on tensor cores, paged, planned once outside of the timing."""
    import flashinfer as fi

    s, batch = inputs.shape, len(inputs.starts)
    counts = torch.tensor([0, *[n // PAGE for n in s.lengths]], dtype=torch.int32)
    indptr = counts.cumsum(0).int()
    counts_of = [batch + 1, int(indptr[-1]), batch]
    buffers = [torch.empty(n, dtype=torch.int32, device="cuda") for n in counts_of]
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=buffers[0], paged_kv_indices_buffer=buffers[1], paged_kv_last_page_len_buffer=buffers[2],
    )  # fmt: skip
    pages = torch.arange(int(indptr[-1]), dtype=torch.int32)
    kind = torch.bfloat16
    last = torch.full((batch,), PAGE, dtype=torch.int32)
    wrapper.plan(
        indptr, pages, last, s.num_heads, s.num_kv_heads, s.head_dim, PAGE, q_data_type=kind, kv_data_type=kind
    )

    def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return wrapper.run(inputs.q, (_paged(inputs, k), _paged(inputs, v)))

    return _over_copies(call, inputs)


def importable_peers() -> dict[str, Callable[[Inputs], list[Call]]]:
    """The peers that this Python can import; FA2 comes with PyTorch."""
    found: dict[str, Callable[[Inputs], list[Call]]] = {"fa2": fa2}
    with contextlib.suppress(Exception):
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # noqa: F401

        found["fa3"] = fa3
    with contextlib.suppress(Exception):
        import flashinfer as fi  # noqa: F401

        found["flashinfer"] = flashinfer
    return found


def copies_for(shape: Shape, rotate: bool = True) -> int:
    """How many caches to walk over: enough to leave no line of the first in L2 when it comes round again."""
    return max(4, min(64, ROTATED_BYTES // shape.kv_bytes)) if rotate else 1


def time_together(
    kernels: dict[str, list[Call]], warmup_s: float = 0.05, replays: int = 15
) -> dict[str, dict[str, float]]:
    """Seconds a call of each kernel: median, p10 and p90 over graph replays, the kernels taking turns."""
    with contextlib.ExitStack() as stack:
        graphs = {name: capture(calls) for name, calls in kernels.items()}
        for graph in graphs.values():
            stack.callback(graph.reset)
        began = time.perf_counter()
        while time.perf_counter() - began < warmup_s * len(graphs):
            for graph in graphs.values():
                graph.replay()
            torch.cuda.synchronize()
        seconds: dict[str, list[float]] = {name: [] for name in graphs}
        for turn in range(replays):
            for name in random.Random(turn).sample(list(graphs), len(graphs)):  # what ran before matters, up to 2 %
                seconds[name].append(replay_seconds(graphs[name]) / len(kernels[name]))
    result = {}
    for name, values in seconds.items():
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        result[name] = {"median": statistics.median(ordered), "p10": low, "p90": high}
    return result


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return ((out.float() - truth).norm() / truth.norm()).item()
