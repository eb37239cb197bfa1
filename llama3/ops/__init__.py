"""The seam: the ops that a model is made of, once in PyTorch and once in CUDA.

`select` decides which implementation runs and says why; nothing falls back in silence.
"""

from __future__ import annotations

from typing import Protocol

import torch

from llama3.config import ModelConfig
from llama3.decode_state import DecodeState
from llama3.errors import DeviceError
from llama3.forward_batch import DecodeBatch, PrefillBatch
from llama3.kv_cache import KVCache, LayerCache
from llama3.ops.reference import ReferenceOps
from llama3.rope import RopeTable
from llama3.sampling import SamplingTensors
from llama3.weights import ModelWeights

CHOICES = ("auto", "reference", "cuda")


class Ops(Protocol):
    """What `llama3.ops.reference` defines and every implementation provides; see there for meanings and shapes."""

    @property
    def name(self) -> str: ...

    @property
    def can_capture_prefill(self) -> bool: ...

    def max_rows(self, config: ModelConfig, device: torch.device) -> int | None: ...

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    def norm_linear(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        squares: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def rope_append_attend(
        self, qkv: torch.Tensor, rope: RopeTable, cache: LayerCache, batch: PrefillBatch | DecodeBatch
    ) -> torch.Tensor: ...

    def linear_add(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor: ...

    def linear_add_squares(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    def norm_swiglu(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        gate_up: torch.Tensor,
        eps: float,
        squares: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def sample(self, logits: torch.Tensor, params: SamplingTensors, positions: torch.Tensor) -> torch.Tensor: ...

    def sample_and_place(
        self,
        logits: torch.Tensor,
        params: SamplingTensors,
        state: DecodeState,
        forbid_early_stops: bool,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def whole_step(
        self, config: ModelConfig, weights: ModelWeights, rope: RopeTable, cache: KVCache, state: DecodeState
    ) -> WholeStep | None: ...


class WholeStep(Protocol):
    """A decode step of one sequence in one launch: it feeds row 0 of a DecodeState and appends to the cache.

    logits: fp32 [1, V], those of the last step launched.
    """

    @property
    def logits(self) -> torch.Tensor: ...

    def launch(self, drawn: torch.Tensor | None = None) -> None:
        """Without `drawn`, one step up to its logits. With it (int64 [n, 1]), n steps that each draw, without
        filters, and place a token as `sample_and_place` does."""
        ...


def select(choice: str, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Ops, str]:
    """The ops for `choice` ("auto", "reference" or "cuda") and a line that says which they are and why.

    Raises DeviceError where "cuda" was asked for and cannot run.
    """
    if choice not in CHOICES:
        raise DeviceError(f"kernels={choice!r} is unknown; choose one of {', '.join(CHOICES)}")
    if choice == "reference":
        return ReferenceOps(), "reference ops (PyTorch), as asked"
    reason = "the device is a CPU" if device.type != "cuda" else None
    if reason is None:
        from llama3.ops.cuda import CudaOps  # builds and loads the kernels: only when they are wanted

        reason = CudaOps.why_not(config, dtype, device)
        if reason is None:
            cuda_ops = CudaOps(config, device)
            return cuda_ops, f"CUDA kernels ({cuda_ops.description})"
    if choice == "cuda":
        raise DeviceError(f"kernels='cuda' cannot run here: {reason}")
    return ReferenceOps(), f"reference ops (PyTorch), because {reason}"
