"""What can be known of the large products without a GPU: what they refuse."""

import pytest
import torch

from llama3.errors import UserError
from llama3.ops import gemm

BF16 = torch.bfloat16
ALIGNED, ODD = 4096, 4098


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ALIGNED, ALIGNED, 0, ALIGNED, 0, 256, 64, 0), "no tokens"),
        ((ALIGNED, ALIGNED, 0, ALIGNED, 1, 12, 64, 0), "num_rows is 12; expected a multiple of 8"),
        ((ALIGNED, ALIGNED, 0, ALIGNED, 1, 24, 64, 2), "num_rows is 24; expected a multiple of 16"),
        ((ALIGNED, ALIGNED, 0, ALIGNED, 1, 256, 60, 0), "size is 60; expected a multiple of 8"),
        ((ALIGNED, ODD, 0, ALIGNED, 1, 256, 64, 0), "weight must be 16-byte aligned"),
        ((ALIGNED, ALIGNED, 0, ALIGNED, 1, 256, 64, 1), "residual"),
        ((ALIGNED, ALIGNED, ALIGNED, ALIGNED, 1, 256, 64, 2), "residual"),
    ],
)
def test_kernel_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gemm.library().gemm(*arguments, 0, stream=0)


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, ALIGNED, 256, 256, 512, 96, 4, 2), "no kernel for tiles of 96 rows in 4 parts by 2"),
        ((0, ALIGNED, 256, 256, 128, 144, 4, 2), "size is too small for 4 parts"),
        ((ODD, ALIGNED, 256, 256, 512, 144, 4, 2), "residual must be 16-byte aligned"),
    ],
)
def test_split_kernel_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gemm.library().split(ALIGNED, ALIGNED, *arguments, 0, stream=0)


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("x", "weight", "residual", "message"),
    [
        (zeros(16), zeros(8, 16), None, r"x is .*\[16\].*expected \[T, K\]"),
        (zeros(2, 12), zeros(8, 12), None, "K a multiple of 8"),
        (zeros(2, 16), zeros(8, 32), None, r"weight is .*expected \[N, 16\] with N a multiple of 8"),
        (zeros(2, 16), zeros(12, 16), None, "N a multiple of 8"),
        (zeros(2, 16), zeros(8, 16), zeros(2, 16), r"residual is .*\[2, 8\]"),
        (zeros(2, 16, dtype=torch.float32), zeros(8, 16), None, "not in torch.float32"),
        (zeros(2, 16), zeros(8, 16), None, "x is on cpu; expected a Hopper GPU"),
        (zeros(2, 32)[:, ::2], zeros(8, 16), None, r"x is .* strides \[32, 2\]"),
    ],
)
def test_product_names_what_is_wrong(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        gemm.product(x, weight, residual)


def test_swiglu_names_what_is_wrong() -> None:
    with pytest.raises(UserError, match="N a multiple of 16"):
        gemm.swiglu(zeros(2, 16), zeros(24, 16))
