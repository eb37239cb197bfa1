"""Rotary position embedding: the frequencies of a Llama-3 folder and the table of cosines and sines.

The half-split layout of Hugging Face checkpoints is used throughout: element i of a head is rotated together with
element i + head_dim / 2.
"""

import math
from dataclasses import dataclass

import torch

from llama3.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """fp32 [head_dim / 2]: radians per position of each rotated pair, with Llama 3.1's frequency scaling if any.

    Wavelengths longer than `original_max_position_embeddings / low_freq_factor` are stretched by `factor`, those
    shorter than `... / high_freq_factor` are kept, and the band between is interpolated (Llama 3.1 reference code).
    """
    # fp32 from the first operation on: checkpoints were trained with fp32 tables, and at position 131071 one fp32
    # rounding of the angle moves a cosine by 4e-3, so "more precise" fp64 tables would be the wrong tables.
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    wavelength = 2 * math.pi / inv_freq
    low_freq_wavelength = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high_freq_wavelength = scaling.original_max_position_embeddings / scaling.high_freq_factor
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    interpolated = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    scaled = torch.where(wavelength > low_freq_wavelength, inv_freq / scaling.factor, interpolated)
    return torch.where(wavelength < high_freq_wavelength, inv_freq, scaled)


@dataclass(frozen=True)
class RopeTable:
    """cos, sin: fp32 [num_positions, head_dim / 2], contiguous."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def build(cls, config: ModelConfig, num_positions: int, device: torch.device | str = "cpu") -> "RopeTable":
        """The table for positions 0 .. num_positions - 1. Computed on the CPU: its cosine is the same everywhere."""
        angles = torch.arange(num_positions).float()[:, None] * inverse_frequencies(config)[None, :]
        return cls(cos=angles.cos().to(device), sin=angles.sin().to(device))

    def rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate heads [T, num_heads, head_dim] to positions [T]; fp32 inside, the dtype of `heads` outside."""
        cos, sin = self.cos[positions][:, None, :], self.sin[positions][:, None, :]  # [T, 1, head_dim / 2]
        first, second = heads.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
