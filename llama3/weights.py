"""The parameters of the model: plain dataclasses of tensors, packed the way the kernels read them.

H hidden size, F intermediate size, Hq and Hkv query and kv heads, D head size, V vocabulary. All tensors are
contiguous, on one device and of one dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llama3.config import GATE_UP_GROUP, ModelConfig


@dataclass
class LayerWeights:
    attn_norm: torch.Tensor | None  # [H]; None: part of qkv
    qkv: torch.Tensor  # [(Hq + 2 Hkv) D, H]: all q heads, then all k heads, then all v heads
    o: torch.Tensor  # [H, Hq D]
    mlp_norm: torch.Tensor | None  # [H]; None: part of gate_up
    gate_up: (
        torch.Tensor
    )  # [2 F, H]: 8 rows of gate, the same 8 rows of up, the next 8 of gate, ...: see gate_up_groups
    down: torch.Tensor  # [H, F]


@dataclass
class ModelWeights:
    embed: torch.Tensor  # [V, H]
    layers: list[LayerWeights]
    final_norm: torch.Tensor  # [H]
    lm_head: torch.Tensor  # [V, H]; tied: the same tensor as embed, not a copy

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every distinct parameter once, in the order in which a forward pass reads them."""
        yield self.embed
        for layer in self.layers:
            parameters = (layer.attn_norm, layer.qkv, layer.o, layer.mlp_norm, layer.gate_up, layer.down)
            yield from (tensor for tensor in parameters if tensor is not None)
        yield self.final_norm
        if self.lm_head is not self.embed:
            yield self.lm_head

    def fold_norms(self) -> None:
        """Multiply the layers' norms into the matrices behind them, in place: no kernel then has to multiply tokens by
        them. The result is rounded once to its dtype, where else the product of token and norm would be."""
        for layer in self.layers:
            for norm, matrix in ((layer.attn_norm, layer.qkv), (layer.mlp_norm, layer.gate_up)):
                if norm is not None:
                    matrix.mul_(norm)
            layer.attn_norm = layer.mlp_norm = None


def gate_up_groups(gate_up: torch.Tensor) -> torch.Tensor:
    """The packed [2 F, H] as a view [F // 8, 2, 8, H]: [:, 0] is gate and [:, 1] is up, 8 rows at a time.

    Row i of gate and row i of up lie 8 rows apart, so one 16-row tile of a tensor-core kernel holds both, and the two
    fragment rows of a thread (r and r + 8) are exactly the pair that silu(gate) * up needs.
    """
    rows, hidden_size = gate_up.shape
    return gate_up.view(rows // (2 * GATE_UP_GROUP), 2, GATE_UP_GROUP, hidden_size)


def empty_weights(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> ModelWeights:
    """Allocated, unwritten parameters. The "meta" device allocates nothing: shapes only."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    hidden, intermediate = config.hidden_size, config.intermediate_size
    embed = empty(config.vocab_size, hidden)
    layers = [
        LayerWeights(
            attn_norm=empty(hidden),
            qkv=empty(config.qkv_size, hidden),
            o=empty(hidden, config.q_size),
            mlp_norm=empty(hidden),
            gate_up=empty(2 * intermediate, hidden),
            down=empty(hidden, intermediate),
        )
        for _ in range(config.num_layers)
    ]
    lm_head = embed if config.tie_word_embeddings else empty(config.vocab_size, hidden)
    return ModelWeights(embed=embed, layers=layers, final_norm=empty(hidden), lm_head=lm_head)


def random_weights(
    config: ModelConfig, device: torch.device | str, dtype: torch.dtype | None = None, seed: int = 0
) -> ModelWeights:
    """Random parameters drawn on `device`; the same for the same config, kind of device, dtype and seed.

    Matrices are normal with the variance that keeps activations of order one at any width, norms are ones.
    """
    weights = empty_weights(config, device, dtype or config.dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    for tensor in weights.tensors():
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, tensor.shape[1] ** -0.5, generator=generator)
    return weights
