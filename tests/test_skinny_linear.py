"""What can be known of the products for few tokens without a GPU: what they refuse, and how they are cut."""

import pytest
import torch

from llama3.errors import UserError
from llama3.ops import one_kernel, skinny_linear
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU
from llama3.ops.skinny_linear import Tiling, choose_tiling, min_tile_rows
from llama3.shapes import shape_config

BF16 = torch.bfloat16
GOOD = {"x": 4096, "weight": 4096, "residual": 0, "out": 4096, "num_tokens": 16, "num_rows": 64}
GOOD |= {"size": 128, "eps": 1e-5, "form": NORM_LINEAR, "tile_rows": 64, "splits": 1, "overlap": False, "stream": 0}


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0; supported: 1 to 32"),
        ({"num_tokens": 33}, "num_tokens is 33"),
        ({"size": 96}, "size is 96; expected a multiple of 64"),
        ({"num_rows": 12}, "num_rows is 12; expected a multiple of 8"),
        ({"num_rows": 24, "form": NORM_SWIGLU}, "num_rows is 24; expected a multiple of 16"),
        ({"tile_rows": 24}, "tile_rows is 24; expected a multiple of 16 from 16 to 128"),
        ({"tile_rows": 144}, "tile_rows is 144"),
        ({"num_tokens": 17, "tile_rows": 32}, "tile_rows is 32; expected a multiple of 16 from 48 to 128"),
        ({"splits": 0}, "splits is 0"),
        ({"splits": 3}, "splits is 3; supported here: 1 to 1"),
        ({"splits": 9, "size": 8192}, "splits is 9; supported here: 1 to 8"),
        ({"residual": 4096}, "a residual belongs to linear_add"),
        ({"form": LINEAR_ADD}, "a residual belongs to linear_add"),
        ({"x": 4098}, "x must be 16-byte aligned"),
        ({"out": 4098}, "out must be 16-byte aligned"),
    ],
)
def test_the_kernel_refuses(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        skinny_linear.library().product(**(GOOD | wrong))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((16,), (8, 16)), "x is .*expected .*T, K"),
        (((2, 64), (32, 128)), r"weight is .*expected contiguous torch.bfloat16 \[32, 64\]"),
        (((2, 64), (32, 64)), "x is on cpu; expected a CUDA device"),
    ],
)
def test_tensors_are_named(shapes: tuple, message: str) -> None:
    x, weight = (torch.zeros(shape, dtype=BF16) for shape in shapes)
    with pytest.raises(UserError, match=message):
        skinny_linear.norm_linear(x, weight, 1e-5)


def test_other_dtypes_and_residuals_are_named() -> None:
    x, weight = torch.zeros(2, 64), torch.zeros(32, 64)
    with pytest.raises(UserError, match=r"x is torch\.float32"):
        skinny_linear.linear_add(x, weight, torch.zeros(2, 32))
    with pytest.raises(UserError, match=r"residual is .*expected contiguous torch.bfloat16 \[2, 32\]"):
        skinny_linear.linear_add(x.to(BF16), weight.to(BF16), torch.zeros(32, 2, dtype=BF16).t())


def test_what_others_do_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_kernel, "is_hopper", lambda device: device.type == "cuda")
    cuda = torch.device("cuda")
    monkeypatch.setattr(one_kernel, "has_fast_memory", lambda device: False)
    assert skinny_linear.pays(16, 2048, 2048, BF16, cuda) and skinny_linear.pays(32, 6144, 4096, BF16, cuda)
    assert not skinny_linear.pays(16, 2048, 2048, BF16, torch.device("cpu"))
    assert not skinny_linear.pays(16, 2048, 2048, torch.float16, cuda)
    assert not skinny_linear.pays(33, 4096, 4096, BF16, cuda)
    assert not skinny_linear.pays(17, 3072, 2048, BF16, cuda)
    assert not skinny_linear.pays(16, 2048, 2040, BF16, cuda)
    assert not skinny_linear.pays(16, 128256, 2048, BF16, cuda)
    monkeypatch.setattr(one_kernel, "has_fast_memory", lambda device: True)
    assert skinny_linear.pays(16, 6144, 4096, BF16, cuda) and not skinny_linear.pays(17, 6144, 4096, BF16, cuda)


def test_llama_1b_fills_the_machine_once() -> None:
    """The tilings that were the best of those measured on 132 multiprocessors."""
    shapes = {"qkv": (3072, 2048), "o": (2048, 2048), "gate-up": (16384, 2048), "down": (2048, 8192)}
    chosen = {name: choose_tiling(16, *shape, num_sms=132) for name, shape in shapes.items()}
    assert chosen == {"qkv": (48, 2), "o": (64, 4), "gate-up": (128, 1), "down": (64, 4)}


@pytest.mark.parametrize("num_tokens", (1, 16, 17, 32))
@pytest.mark.parametrize("shape", ("1b", "3b", "8b", "tiny"))
def test_tilings_are_what_the_kernel_takes(shape: str, num_tokens: int) -> None:
    c = shape_config(shape)
    products = [(c.qkv_size, c.hidden_size), (c.hidden_size, c.q_size), (2 * c.intermediate_size, c.hidden_size)]
    products += [(c.hidden_size, c.intermediate_size), (c.vocab_size, c.hidden_size), (16, 64)]
    for num_rows, size in products:
        tiling = choose_tiling(num_tokens, num_rows, size, num_sms=132)
        assert isinstance(tiling, Tiling)
        assert tiling.tile_rows % 16 == 0 and min_tile_rows(num_tokens) <= tiling.tile_rows <= 128
        assert 1 <= tiling.splits <= 8 and tiling.splits <= -(-size // 256)
