"""How each op runs on an NVIDIA GPU; `llama3.ops.reference` says what it means, docs/cuda-ops.md why it runs so."""

import torch

import load_custom_kernels
from llama3.config import ModelConfig
from llama3.decode_state import DecodeState
from llama3.forward_batch import DecodeBatch, PrefillBatch
from llama3.kv_cache import KVCache, LayerCache
from llama3.ops import batch_linear, elementwise, gemm_search, linear, prefill_attention, sampling, short_prefill
from llama3.ops.decode_attn import MAX_GROUP, max_batch, rope_append_decode
from llama3.ops.decode_step import DecodeStep
from llama3.ops.prefill_attention import PrefillPlan
from llama3.rope import RopeTable
from llama3.sampling import SamplingTensors
from llama3.weights import ModelWeights

FAMILIES = (
    "elementwise",
    "gemm",
    "skinny_linear",
    "batch_linear",
    "decode_attn",
    "short_prefill",
    "sampling",
    "decode_step",
)


class CudaOps:
    """The seam's ops as CUDA kernels, in bf16 or fp16. No op waits for the GPU; prefill can be captured if nothing is
    cached before it."""

    name = "cuda"
    can_capture_prefill = True

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.overlap = elementwise.can_overlap(device)
        self.description = (
            "split-KV decode attention, attention of short prompts, products of a decode step, cuBLASLt, cuDNN and "
            "FlashAttention, fused elementwise and sampling"
        )
        self._plan: PrefillPlan | None = None

    @staticmethod
    def why_not(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why the kernels cannot run this model here, in one line; None if they can. Builds them if need be."""
        if device.type != "cuda" or not torch.cuda.is_available():
            return f"the CUDA kernels need an NVIDIA GPU, and the device is {device}"
        if dtype not in elementwise.DTYPES:
            return f"the CUDA kernels compute in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
        if config.num_heads // config.num_kv_heads > MAX_GROUP:
            ratio = f"{config.num_heads} query heads for {config.num_kv_heads} key-value heads"
            return f"the model has {ratio}, and the CUDA kernels take at most {MAX_GROUP} for one"
        if config.hidden_size % 8:
            return f"hidden_size is {config.hidden_size}, and the CUDA kernels need a multiple of 8"
        try:
            arch = load_custom_kernels.arch_for(*torch.cuda.get_device_capability(device))
            built = load_custom_kernels.detect_arch()
            if arch != built:
                return f"the CUDA kernels are built for GPU 0 (sm_{built}), and {device} is sm_{arch}: hide the others"
            for family in FAMILIES:
                load_custom_kernels.load(family)
        except load_custom_kernels.KernelBuildError as error:
            return str(error)
        return None

    def max_rows(self, config: ModelConfig, device: torch.device) -> int | None:
        return max_batch(config.head_dim, device)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return elementwise.embed(token_ids, table, batch_linear.MIN_TOKENS <= len(token_ids) <= batch_linear.MAX_TOKENS)

    def norm_linear(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        squares: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return linear.norm_linear(x, norm_weight, weight, eps, squares)

    def rope_append_attend(
        self, qkv: torch.Tensor, rope: RopeTable, cache: LayerCache, batch: PrefillBatch | DecodeBatch
    ) -> torch.Tensor:
        if isinstance(batch, DecodeBatch):
            return rope_append_decode(
                qkv,
                rope.cos,
                rope.sin,
                cache.k,
                cache.v,
                batch.positions,
                slots=batch.slots,
                blocks_per_slot=cache.blocks_per_slot,
                pdl=self.overlap,
            )
        if self._plan is None or self._plan.batch is not batch:  # one a forward pass: its layers share it
            self._plan = PrefillPlan.of(batch)
        if short_prefill.takes(self._plan):
            return short_prefill.rope_append_attend(qkv, rope, cache, self._plan)
        num_kv_heads, head_dim = cache.k.shape[1], cache.k.shape[3]
        rotated = elementwise.rope_append(qkv, rope, cache, batch.slots, batch.positions)
        q, k = rotated[:, :-num_kv_heads], rotated[:, -num_kv_heads:]
        v = qkv.unflatten(1, (-1, head_dim))[:, -num_kv_heads:]
        return prefill_attention.attend(q, k, v, cache, self._plan).flatten(1)

    def linear_add(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return linear.linear_add(x, weight, residual)

    def linear_add_squares(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return linear.linear_add_squares(x, weight, residual)

    def norm_swiglu(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        gate_up: torch.Tensor,
        eps: float,
        squares: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return linear.norm_swiglu(x, norm_weight, gate_up, eps, squares)

    def sample(self, logits: torch.Tensor, params: SamplingTensors, positions: torch.Tensor) -> torch.Tensor:
        return sampling.sample(logits, params, positions)

    def sample_and_place(
        self,
        logits: torch.Tensor,
        params: SamplingTensors,
        state: DecodeState,
        forbid_early_stops: bool,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return sampling.sample_and_place(logits, params, state, out, forbid_early_stops=forbid_early_stops)

    def whole_step(
        self, config: ModelConfig, weights: ModelWeights, rope: RopeTable, cache: KVCache, state: DecodeState
    ) -> DecodeStep | None:
        gemm_search.expect_decode(state.num_rows)  # the batch size at which a job spends its time
        if DecodeStep.supports(config, weights.embed.device) is not None or weights.embed.dtype != torch.bfloat16:
            return None
        return DecodeStep(config, weights, rope, cache, state)
