"""The rotary table against transformers' rotary embedding, to the last position a Llama-3 model has."""

from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llama3.config import ModelConfig
from llama3.rope import RopeTable, inverse_frequencies
from tests.model_folders import make_model_folder

POSITIONS = torch.tensor([0, 1, 63, 64, 8191, 8192, 8193, 32768, 65535, 100000, 131071])


@pytest.mark.parametrize("rope_factor", [None, 8, 32])
@pytest.mark.parametrize("head_dim", [64, 128])
@torch.inference_mode()
def test_rotation_equals_transformers(tmp_path: Path, rope_factor: int | None, head_dim: int) -> None:
    reference = make_model_folder(tmp_path, rope_factor=rope_factor, head_dim=head_dim, num_hidden_layers=1)
    config = ModelConfig.from_folder(tmp_path)
    table = RopeTable.build(config, 131072)
    heads = torch.randn(len(POSITIONS), 3, head_dim)
    cos, sin = reference.model.rotary_emb(heads, POSITIONS[None])
    expected, _ = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(table.rotate(heads, POSITIONS), expected[0].transpose(0, 1), atol=1e-5, rtol=0)


def test_known_frequencies_of_llama_3_2(tmp_path: Path) -> None:
    """Worked by hand from the scaling's definition: factor 32, low 1, high 4, 8192 positions, base 500000."""
    make_model_folder(tmp_path, rope_factor=32)
    frequencies = inverse_frequencies(ModelConfig.from_folder(tmp_path)).double()
    plain = 500000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    wavelengths = 2 * torch.pi / plain
    long, short = wavelengths > 8192, wavelengths < 2048
    assert long.any() and short.any() and (~long & ~short).any()
    torch.testing.assert_close(frequencies[long], plain[long] / 32, rtol=1e-6, atol=0)
    torch.testing.assert_close(frequencies[short], plain[short], rtol=1e-6, atol=0)
    between = ~long & ~short
    assert torch.all(frequencies[between] < plain[between])
    assert torch.all(frequencies[between] > plain[between] / 32)


def test_bf16_heads_are_rotated_in_fp32(tmp_path: Path) -> None:
    """A bf16 table would be off by radians at position 131071."""
    make_model_folder(tmp_path, rope_factor=8)
    table = RopeTable.build(ModelConfig.from_folder(tmp_path), 131072)
    heads = torch.randn(1, 2, 64).bfloat16()
    position = torch.tensor([131071])
    expected = table.rotate(heads.float(), position).bfloat16()
    assert torch.equal(table.rotate(heads, position), expected)
