"""The memory plan: what a job takes, against what there is, before anything is allocated."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llama3.config import ModelConfig
from llama3.errors import CapacityError
from llama3.kv_cache import BLOCK_SIZE, KVCache

GIB = 2**30
# Left to the driver, the allocator's rounding and captured graphs.
RESERVE_FRACTION = 0.04
# Most prompt tokens of one prefill call, by kind of device: the first that fits beside the cache.
CALL_SIZES = {"cuda": (32768, 16384, 8192, 4096, 2048), "cpu": (2048,)}


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, memory cached by PyTorch included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_stats_as_nested_dict(device)  # once: the GPU may be waiting for a job to be planned
        return free + held["reserved_bytes"]["all"]["current"] - held["allocated_bytes"]["all"]["current"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def activation_bytes(config: ModelConfig, num_tokens: int, num_rows: int, dtype: torch.dtype) -> int:
    """Peak bytes beside weights and cache of a prefill of `num_tokens` or a decode step of `num_rows`.

    Per token, while gate-up runs: the residual stream, its normed copy and attention's result; qkv; gate-up, its
    product, and the product of the layer before. In attention: two results and the residual stream; qkv and the rotated
    heads; that product. Besides 8 bytes each of token, slot and position, and 4 of each head's softmax. Per row: logits
    in the model's dtype, their fp32 copy, and three more of that size while sampling sorts them.
    """
    mlp, attention = 4 * config.intermediate_size, config.intermediate_size + 2 * config.qkv_size
    per_token = (3 * config.hidden_size + config.qkv_size + max(mlp, attention)) * dtype.itemsize
    per_token += 3 * 8 + 4 * config.num_heads
    return num_tokens * per_token + num_rows * config.vocab_size * (dtype.itemsize + 4 * 4)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part, and what is free for them together. `weights` is 0 once they are loaded.

    num_batched_tokens: most prompt tokens of one prefill call.
    """

    config: ModelConfig
    dtype: torch.dtype
    free: int
    weights: int
    num_batched_tokens: int

    @property
    def usable(self) -> int:
        return int(self.free * (1 - RESERVE_FRACTION)) - self.weights

    def needed(self, num_rows: int, max_len: int) -> int:
        """Bytes beside the weights for `num_rows` sequences of `max_len` tokens."""
        cache = KVCache.num_bytes(self.config, num_rows, max_len, self.dtype)
        return cache + activation_bytes(
            self.config, min(self.num_batched_tokens, num_rows * max_len), num_rows, self.dtype
        )

    def largest_num_rows(self, max_len: int, limit: int) -> int:
        """The most sequences of `max_len` tokens that fit, at most `limit`; 0 if not even one does."""
        return _largest(lambda num_rows: self.needed(num_rows, max_len) <= self.usable, limit)

    def largest_max_len(self, num_rows: int, limit: int) -> int:
        """The longest context, a multiple of the block size and at most `limit`, for `num_rows` sequences."""
        blocks = _largest(lambda n: self.needed(num_rows, n * BLOCK_SIZE) <= self.usable, limit // BLOCK_SIZE)
        return blocks * BLOCK_SIZE

    def fits(self, num_rows: int, max_len: int) -> bool:
        return self.usable >= 0 and self.needed(num_rows, max_len) <= self.usable

    def check(self, num_rows: int, max_len: int) -> None:
        """Raise CapacityError, with the budget and what would fit, if the job does not."""
        if self.fits(num_rows, max_len):
            return
        cache = KVCache.num_bytes(self.config, num_rows, max_len, self.dtype)
        fewer, shorter = self.largest_num_rows(max_len, num_rows), self.largest_max_len(num_rows, max_len)
        fitting = [f"max_num_seqs={fewer} at this length"] if fewer else []
        fitting += [f"max_model_len={shorter} for this many"] if shorter else []
        alone = 0 if fitting else self.largest_max_len(1, max_len)
        fitting += [f"max_num_seqs=1 with max_model_len={alone}"] if alone else []
        raise CapacityError(
            f"not enough memory for {num_rows} sequences of {max_len} tokens: weights {self.weights / GIB:.2f} GiB, "
            f"KV cache {cache / GIB:.2f} GiB, activations and logits "
            f"{(self.needed(num_rows, max_len) - cache) / GIB:.2f} GiB, free {self.free / GIB:.2f} GiB; "
            f"what fits: {', or '.join(fitting) or 'nothing: a smaller model or more memory is needed'}"
        )


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest of 1 .. limit that fits, where all smaller ones do too; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
