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
from llama3.kv_cache import KVCache
from llama3.rope import RopeTable
from llama3.weights import ModelWeights

OPS = ("qkv", "o", "gate_up", "down", "head")  # the order of decode_step::Op
# Chunks of about 32 KB that a multiprocessor requests ahead of their arrival: in the middle of a long projection, and
# from EXCHANGE_CHUNKS before its end until the next one's input is there.
MAX_STREAMING, MAX_EXCHANGING, EXCHANGE_CHUNKS = 4, 2, 3
MIN_CHUNK_ROOM = 96 * 1024  # bytes of ring without which memory would idle at every exchange between blocks


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("decode_step")


class DecodeStep:
    """Decodes row 0 of a DecodeState: bf16 weights and cache, fp32 in between.

    The step feeds `state.token_ids[0]` at `state.positions[0]` of slot `state.slots[0]` and appends its key and value
    to the cache. A launch that draws leaves the drawn token and its position in the state, or IDLE after a stop token or
    the last position, exactly as DecodeState.place does; it draws greedily where the temperature is 0 and otherwise by
    Gumbel-max without filters (top-k, top-p and min-p are not applied). An idle row, or one without room for all steps of
    the launch in its slot, is left alone, and so is everything else.

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
        properties = torch.cuda.get_device_properties(device)
        self.grid, self.max_smem_bytes = properties.multi_processor_count, properties.shared_memory_per_block_optin
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
        if major < 9:
            return f"it needs bulk copies into shared memory (compute capability 9.0 or newer), and this GPU has {major}.{minor}"
        properties = torch.cuda.get_device_properties(device)
        return _shape_reason(config, properties.multi_processor_count, properties.shared_memory_per_block_optin)

    def launch(self, drawn: torch.Tensor | None = None) -> None:
        """Enqueue on the current stream: one step that leaves `logits` and no more, or with `drawn` (int64 [n, 1] or [n],
        contiguous) n steps that draw their tokens into it. No host synchronisation; can be captured in a graph."""
        params = self._params
        if drawn is not None and (
            drawn.dtype != torch.int64 or drawn.device != self._device or not drawn.is_contiguous() or drawn.numel() < 1
        ):
            raise UserError(
                f"decode step: drawn is {drawn.dtype} {list(drawn.shape)} on {drawn.device}; "
                f"expected contiguous int64 [num_steps] on {self._device}"
            )
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
        self._buffers = {
            "x_attn": zeros(config.hidden_size),
            "x_mlp": zeros(config.hidden_size),
            "qkv": zeros(config.qkv_size),
            "attn": zeros(config.q_size),
            "act": zeros(config.intermediate_size),
            "split_out": zeros(pairs * config.head_dim, torch.int64),
            "split_state": zeros(pairs * 2, torch.int64),
            "candidates": zeros(self.grid, torch.int64),
            "steps_done": zeros(1),
            "profile": zeros(self.grid * library().profile_slots, torch.int64),
        }
        layer_tensors = [(w.attn_norm, w.qkv, w.o, w.mlp_norm, w.gate_up, w.down) for w in weights.layers]
        self._layers = torch.tensor(
            [[t.data_ptr() for t in layer] for layer in layer_tensors], dtype=torch.int64, device=self._device
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
            "single_split_tiles": 4,
            "num_stop_ids": state.max_stop_ids,
        }
        for name, value in numbers.items():
            setattr(params, name, value)
        for op, (rows, columns, row_unit) in enumerate(_linears(config)):
            params.set_linear(op, rows, columns, row_unit)
        self._params = params


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
    if group > library().max_group:
        return f"it takes at most {library().max_group} query heads a kv head, and the model has {group}"
    if config.hidden_size < grid:
        return f"every one of the {grid} multiprocessors needs a row of the hidden size, which is {config.hidden_size}"
    if config.num_kv_heads > grid:
        return f"it gives every kv head a multiprocessor, and there are {grid} for {config.num_kv_heads} heads"
    for op, (_, columns, _) in zip(OPS, _linears(config), strict=True):
        if not library().fits_columns(columns):
            return f"its warps cannot share rows of {columns} columns (the {op} projection) evenly"
    room = max_smem_bytes - library().fixed_smem_bytes(config.num_layers, config.head_dim, group)
    if room < MIN_CHUNK_ROOM:
        return f"a multiprocessor has {max_smem_bytes} bytes of shared memory, too few to stream weights through"
    return None


def _check(
    config: ModelConfig, weights: ModelWeights, rope: RopeTable, cache: KVCache, state: DecodeState
) -> None:
    """Raise UserError for a tensor that the kernel would misread."""
    device = weights.embed.device
    for index, tensor in enumerate(weights.tensors()):
        if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous() or tensor.device != device or tensor.data_ptr() % 16:
            raise UserError(
                f"decode step: weight {index} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected contiguous "
                f"bfloat16 on {device}, aligned to 16 bytes"
            )
    shape = (config.num_kv_heads, 64, config.head_dim)
    for name, tensor in (("cache.k", cache.k), ("cache.v", cache.v)):
        if tensor.dtype != torch.bfloat16 or tensor.shape[2:] != shape or not tensor.is_contiguous() or tensor.device != device:
            raise UserError(
                f"decode step: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected contiguous bfloat16 "
                f"[num_layers, num_blocks, {', '.join(map(str, shape))}] on {device}"
            )
    for name, tensor in (("rope.cos", rope.cos), ("rope.sin", rope.sin)):
        if tensor.dtype != torch.float32 or tensor.shape[1:] != (config.head_dim // 2,) or tensor.device != device:
            raise UserError(
                f"decode step: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                f"expected float32 [num_positions, {config.head_dim // 2}] on {device}"
            )
    if state.token_ids.device != device:
        raise UserError(f"decode step: the decode state is on {state.token_ids.device}, the weights on {device}")
