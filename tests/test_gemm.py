"""What can be known of the large products without a GPU: what they refuse, and how they choose."""

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
    ("num_rows", "size", "epilogue", "dtype", "plan", "message"),
    [
        (256, 512, 0, 0, {"rows": 96}, "tiles of 96 rows by 128 tokens in 1 parts"),
        (256, 512, 0, 0, {"rows": 256, "splits": 3}, "tiles of 256 rows by 128 tokens in 3 parts"),
        (256, 512, 0, 1, {"rows": 128}, "for this dtype and epilogue .*; all have 256 by 128 in 1 part"),
        (256, 512, 2, 0, {"rows": 192}, "tiles of 192 rows"),
        (256, 64, 0, 0, {"rows": 128, "splits": 2}, "size is 64; for 2 parts it must be over 64"),
        (256, 192, 0, 0, {"rows": 256, "splits": 4}, "size is 192; for 4 parts it must be over 192"),
        (256, 512, 0, 0, {"rows": 128, "splits": 2}, "the workspace has 0 bytes; expected 278528"),
        (256, 512, 0, 0, {"splits": 2, "workspace": ALIGNED, "workspace_bytes": 1 << 14}, "has 16384 bytes; expected"),
        (256, 512, 0, 0, {"splits": 2, "workspace": ODD, "workspace_bytes": 1 << 30}, "16-byte aligned"),
        (1 << 16, 512, 0, 0, {"splits": 2, "workspace": ALIGNED, "workspace_bytes": 1 << 30}, "512 parts of tiles"),
    ],
)
def test_kernel_refuses_plans(num_rows: int, size: int, epilogue: int, dtype: int, plan: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gemm.library().gemm(ALIGNED, ALIGNED, 0, ALIGNED, 1, num_rows, size, epilogue, dtype, stream=0, **plan)


@pytest.mark.nvcc
def test_the_workspace_is_enough_for_every_plan() -> None:
    clusters = 66
    sums = max((plan.splits - 1) * plan.rows // plan.splits for plans in gemm.PLANS.values() for plan in plans)
    assert gemm.library().workspace_bytes(clusters) == (1 << 14) + clusters * sums * gemm.TILE * 4


CLUSTERS = 66  # of an H200


@pytest.mark.parametrize(
    ("epilogue", "num_rows", "size", "plans"),
    [
        (gemm.PLAIN, 6144, 4096, [(192, 2)]),  # 8B at 256 tokens
        (gemm.RESIDUAL, 4096, 4096, [(128, 2), (256, 4)]),
        (gemm.RESIDUAL, 4096, 64, []),  # parts would be empty
        (gemm.PLAIN, 128256, 4096, [(256, 1), (192, 1), (128, 1)]),
        (gemm.PLAIN, 8192, 4096, [(128, 1), (256, 2)]),
        (gemm.PLAIN, 128, 4096, []),
    ],
)
def test_promising_plans(epilogue: int, num_rows: int, size: int, plans: list[tuple[int, int]]) -> None:
    assert gemm.promising(epilogue, BF16, 256, num_rows, size, CLUSTERS) == [gemm.Plan(*plan) for plan in plans]
    assert gemm.promising(epilogue, torch.float16, 256, num_rows, size, CLUSTERS) == [
        gemm.WHOLE for plan in plans if gemm.Plan(*plan) == gemm.WHOLE
    ]


def test_no_plan_keeps_less_than_its_share_busy() -> None:
    for num_tokens in (1, 128, 129, 256, 257, 512, 1024):
        for num_rows in range(1024, 32768, 1024):
            for plan in gemm.promising(gemm.PLAIN, BF16, num_tokens, num_rows, 4096, CLUSTERS):
                assert num_tokens > plan.tokens  # or one of two multiprocessors would have none
                parts = -(-num_tokens // (2 * plan.tokens)) * -(-num_rows // plan.rows) * plan.splits
                assert parts <= CLUSTERS or plan.splits == 1
                assert parts / CLUSTERS / -(-parts // CLUSTERS) >= gemm.MIN_OCCUPANCY


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "size", "of_swiglu", "of_others"),
    [
        (256, 28672, 4096, gemm.Plan(224), gemm.WHOLE),  # two rounds either way
        (2048, 28672, 4096, gemm.WHOLE, gemm.WHOLE),
        (4096, 28672, 4096, gemm.WIDE, gemm.WIDE),  # 18 rounds
        (32768, 28672, 4096, gemm.WIDE, gemm.WIDE),
        (32768, 4096, 14336, gemm.WIDE, gemm.WIDE),
        (16384, 4096, 4096, gemm.WHOLE, gemm.WHOLE),  # 11 rounds
        (600, 128256, 4096, gemm.WHOLE, gemm.WHOLE),  # the second tile of 512 tokens would be nearly empty
        (32768, 16384, 2048, gemm.WHOLE, gemm.WHOLE),  # a narrow model
        (256, 16384, 2048, gemm.WHOLE, gemm.WHOLE),
    ],
)
def test_default_plans(num_tokens: int, num_rows: int, size: int, of_swiglu: gemm.Plan, of_others: gemm.Plan) -> None:
    sizes = num_tokens, num_rows, size, CLUSTERS
    assert gemm.default_plan(gemm.SWIGLU, BF16, *sizes) == of_swiglu
    for epilogue in (gemm.PLAIN, gemm.RESIDUAL):
        assert gemm.default_plan(epilogue, BF16, *sizes) == of_others
    for epilogue in (gemm.PLAIN, gemm.RESIDUAL, gemm.SWIGLU):
        assert gemm.default_plan(epilogue, torch.float16, *sizes) == gemm.WHOLE


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
