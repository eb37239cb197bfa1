"""A whole decode step of one sequence in one persistent kernel (csrc/decode_step; docs/decode-step.md explains it).

`DecodeStep.supports` says whether a model fits, and if not, why. Everything a step reads or writes lies at fixed
addresses, so a launch can be captured; one launch can also decode several tokens, each from the last.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType

import torch

from llama3.config import ModelConfig
from llama3.decode_state import DecodeState
from llama3.errors import UserError
from llama3.kv_cache import BLOCK_SIZE, KVCache
from llama3.rope import RopeTable
from llama3.weights import ModelWeights

OPS = ("qkv", "o", "gate_up", "down", "head")  # the order of decode_step::Op
# Chunks of up to 32 KB that a multiprocessor requests ahead of their arrival: in the middle of a long projection, and
# from EXCHANGE_CHUNKS before its end until the next one's input is there. Measured on one H200 (docs/log.md).
MAX_STREAMING, MAX_EXCHANGING, EXCHANGE_CHUNKS = 2, 1, 2
SINGLE_SPLIT_SLOTS = 4  # of the ring, whose tokens one block attends to alone: a second one costs an exchange
MIN_SLOTS = 4  # of the ring; below, memory would idle at every exchange between blocks


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("decode_step")


class DecodeStep:
    """Decodes row 0 of a DecodeState: bf16 weights and cache, fp32 in between.

    The step feeds `state.token_ids[0]` at `state.positions[0]` of slot `state.slots[0]` and appends its key and value
    to the cache. A launch that draws leaves the drawn token and its position in the state, or IDLE after a stop token
    or the last position, exactly as DecodeState.place does; it draws the token that `llama3.ops.sampling.sample` draws
    from the same logits. Two things it cannot do: top-k beside top-p (it then applies top-p alone), and keep a stop
    token from being drawn before min_tokens. An idle row, or one without room for all steps of the launch in its slot,
    is left alone, and so is everything else. Steps after a stop token in the same launch still run; whoever reads the
    tokens drops theirs.

    `logits` is fp32 [1, V]: those of the last step launched.
    """

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, rope: RopeTable, cache: KVCache, state: DecodeState
    ) -> None:
        device = weights.embed.device
        if (reason := self.supports(config, device)) is not None:
            raise UserError(f"the persistent decode step cannot run this model: {reason}")
        _check(config, weights, rope, cache, state)
        self.config, self.weights, self.rope, self.cache, self.state = config, weights, rope, cache, state
        self.grid, self.max_smem_bytes = _resources(device)
        self.logits = torch.zeros(1, config.vocab_size, dtype=torch.float32, device=device)
        self._device = device
        self._make_params()

    @staticmethod
    def supports(config: ModelConfig, device: torch.device | str) -> str | None:
        """None if the kernel runs this model on this device, else the reason why not."""
        device = torch.device(device)
        if device.type != "cuda":
            return f"it needs an NVIDIA GPU, and the device is {device}"
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) != (9, 0):
            return f"it is written for Hopper (compute capability 9.0), and this GPU has {major}.{minor}"
        return _shape_reason(config, *_resources(device))

    def launch(self, drawn: torch.Tensor | None = None) -> None:
        """Enqueue one step that leaves `logits` and no more; with `drawn`, n steps that draw their tokens into it.

        drawn: int64 [n] or [n, 1], contiguous. Runs on the current stream without host synchronisation and can be
        captured in a graph. All multiprocessors must be free for it: nothing else may run beside it for long.
        """
        params = self._params
        if drawn is not None and (drawn.numel() < 1 or not _is(drawn, torch.int64, self._device)):
            raise _wrong("drawn", drawn, f"contiguous int64 [num_steps] on {self._device}")
        params.draws = drawn is not None
        params.num_steps = 1 if drawn is None else drawn.numel()
        params.drawn = 0 if drawn is None else drawn.data_ptr()
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            library().launch(params, self.config.head_dim, self.grid, self.max_smem_bytes, stream)

    def reset(self) -> None:
        """Make the exchange buffers as new: needed after a launch that did not run to its end, and only then."""
        for tensor in self._buffers.values():
            tensor.zero_()

    def _make_params(self) -> None:
        config, weights, state, params = self.config, self.weights, self.state, library().Params()
        group = config.num_heads // config.num_kv_heads
        max_splits = 1
        while 2 * max_splits <= min(library().max_splits, self.grid // config.num_kv_heads):
            max_splits *= 2

        def zeros(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(count, dtype=dtype, device=self._device)

        pairs = config.num_kv_heads * max_splits * group
        tile_bytes = 2 * BLOCK_SIZE * config.head_dim * 2  # keys and values of one head in a block of the cache
        self._buffers = {
            "x_attn": zeros(config.hidden_size),
            "x_mlp": zeros(config.hidden_size),
            "qkv": zeros(config.qkv_size),
            "attn": zeros(config.q_size),
            "act": zeros(config.intermediate_size),
            "split_out": zeros(pairs * config.head_dim, torch.int64),
            "split_state": zeros(pairs * 2, torch.int64),
            "ballots": zeros(2 * self.grid * library().ballot_stride, torch.int64),
            "steps_done": zeros(2),
            "profile": zeros(self.grid * library().profile_slots, torch.int64),
        }
        layer_tensors = [(w.attn_norm, w.qkv, w.o, w.mlp_norm, w.gate_up, w.down) for w in weights.layers]
        self._layers = torch.tensor(
            [[0 if t is None else t.data_ptr() for t in layer] for layer in layer_tensors],
            dtype=torch.int64,
            device=self._device,
        )
        sampling = state.sampling
        pointers = {
            **self._buffers,
            "layers": self._layers,
            "embed": weights.embed,
            "final_norm": weights.final_norm,
            "lm_head": weights.lm_head,
            "cos": self.rope.cos,
            "sin": self.rope.sin,
            "k_cache": self.cache.k,
            "v_cache": self.cache.v,
            "token_id": state.token_ids,
            "position": state.positions,
            "slot": state.slots,
            "stop_ids": state.stop_ids,
            "first_stop_position": state.first_stop_positions,
            "last_position": state.last_positions,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
            "request": sampling.request,
            "sample": sampling.sample,
            "logits": self.logits,
        }
        for name, tensor in pointers.items():
            setattr(params, name, tensor.data_ptr())
        numbers = {
            "stride_cache_layer": self.cache.k.stride(0),
            "blocks_per_slot": self.cache.blocks_per_slot,
            "max_positions": min(self.cache.max_len, self.rope.cos.shape[0]),
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "vocab_size": config.vocab_size,
            "rms_norm_eps": config.rms_norm_eps,
            "softmax_scale_log2": math.log2(math.e) / math.sqrt(config.head_dim),
            "max_streaming": MAX_STREAMING,
            "max_exchanging": MAX_EXCHANGING,
            "exchange_chunks": EXCHANGE_CHUNKS,
            "max_splits": max_splits,
            "single_split_tiles": SINGLE_SPLIT_SLOTS * library().slot_bytes // tile_bytes,
            "num_stop_ids": state.max_stop_ids,
        }
        for name, value in numbers.items():
            setattr(params, name, value)
        for op, (rows, columns, row_unit) in enumerate(_linears(config)):
            params.set_linear(op, rows, columns, row_unit)
        self._params = params


def _resources(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def _linears(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(rows, columns, unit in which rows are dealt to blocks) of each of OPS; a gate and its up row stay together."""
    return [
        (config.qkv_size, config.hidden_size, 1),
        (config.hidden_size, config.q_size, 1),
        (2 * config.intermediate_size, config.hidden_size, 16),
        (config.hidden_size, config.intermediate_size, 1),
        (config.vocab_size, config.hidden_size, 1),
    ]


def _shape_reason(config: ModelConfig, grid: int, max_smem_bytes: int) -> str | None:
    """Why the kernel cannot run a model of this shape on a GPU with `grid` multiprocessors, or None."""
    if config.dtype != torch.bfloat16:
        return f"it is written for bfloat16 weights, and the model's are {config.dtype}"
    group = config.num_heads // config.num_kv_heads
    if group > (most := library().max_group):
        return f"it takes at most {most} query heads a kv head, and the model has {group}"
    if config.hidden_size < grid:
        return f"every one of the {grid} multiprocessors needs a row of the hidden size, which is {config.hidden_size}"
    if config.vocab_size > (most := library().max_head_rows * grid):
        return f"its {grid} multiprocessors can hold {most} logits, and the vocabulary has {config.vocab_size} tokens"
    if config.num_kv_heads > grid:
        return f"it gives every kv head a multiprocessor, and there are {grid} for {config.num_kv_heads} heads"
    for op, (_, columns, _) in zip(OPS, _linears(config), strict=True):
        if not library().fits_columns(columns):
            return f"its warps cannot share rows of {columns} columns (the {op} projection) evenly"
    room = max_smem_bytes - library().fixed_smem_bytes(config.num_layers, config.head_dim, group)
    if room < MIN_SLOTS * library().slot_bytes:
        return f"a multiprocessor has {max_smem_bytes} bytes of shared memory, too few to stream weights through"
    return None


def _check(config: ModelConfig, weights: ModelWeights, rope: RopeTable, cache: KVCache, state: DecodeState) -> None:
    """Raise UserError for a tensor that the kernel would misread."""
    device = weights.embed.device
    for index, tensor in enumerate(weights.tensors()):
        if tensor.data_ptr() % 16 or not _is(tensor, torch.bfloat16, device):
            raise _wrong(f"weight {index}", tensor, f"contiguous bfloat16 on {device}, aligned to 16 bytes")
    shape = (config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    for name, tensor in (("cache.k", cache.k), ("cache.v", cache.v)):
        if tensor.shape[0] != config.num_layers or tensor.shape[2:] != shape or not _is(tensor, torch.bfloat16, device):
            wanted = f"[{config.num_layers}, num_blocks, {', '.join(map(str, shape))}]"
            raise _wrong(name, tensor, f"contiguous bfloat16 {wanted} on {device}")
    for name, tensor in (("rope.cos", rope.cos), ("rope.sin", rope.sin)):
        if tensor.shape[1:] != (config.head_dim // 2,) or not _is(tensor, torch.float32, device):
            raise _wrong(name, tensor, f"contiguous float32 [num_positions, {config.head_dim // 2}] on {device}")
    if state.token_ids.device != device:
        raise UserError(f"decode step: the decode state is on {state.token_ids.device}, the weights on {device}")


def _is(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    return tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous()


def _wrong(name: str, tensor: torch.Tensor, expected: str) -> UserError:
    found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    return UserError(f"decode step: {name} is {found}; expected {expected}")
