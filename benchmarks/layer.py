"""What benchmarks of a model's ops start from: the kernels for its shape, and the products of its layers."""

import torch

from llama3.config import ModelConfig
from llama3.errors import UserError
from llama3.ops.cuda import CudaOps


def cuda_ops(config: ModelConfig) -> CudaOps:
    """The kernels for bf16 on the GPU in use. Raises UserError, saying why, where they cannot run."""
    reason = CudaOps.why_not(config, torch.bfloat16, torch.device("cuda"))
    if reason is not None:
        raise UserError(reason)
    return CudaOps(config, torch.device("cuda", torch.cuda.current_device()))


def product_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(rows, columns) of a layer's four matrices, by the name of their product."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": (config.qkv_size, hidden),
        "o": (hidden, config.q_size),
        "gate-up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
