"""What can be known of the products for few tokens without a GPU: what they refuse, and how they are cut."""

import contextlib

import pytest
import torch

from llama3.errors import UserError
from llama3.ops import one_kernel, plan_table, skinny_linear, skinny_plans
from llama3.ops.one_kernel import LINEAR, LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU
from llama3.ops.skinny_plans import Plan, choose_plan, min_tile_rows
from llama3.shapes import shape_config

BF16 = torch.bfloat16
GOOD = {"x": 4096, "weight": 4096, "residual": 0, "out": 4096, "num_tokens": 16, "num_rows": 64}
GOOD |= {"size": 128, "eps": 1e-5, "form": NORM_LINEAR, "tile_rows": 64, "splits": 1, "overlap": False, "stream": 0}
GOOD |= {"shared_bytes": 106 << 10, "trigger": 4, "ahead": 16}


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
        ({"ahead": -1}, "ahead is -1; expected 0 or more stages"),
        ({"shared_bytes": 20 << 10}, "a block needs [0-9]+ bytes of shared memory, and may have 20480"),
        ({"form": LINEAR}, "form is 3; supported here: norm_linear, linear_add, norm_swiglu"),
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
    assert skinny_linear.pays(8, 2048, 8192, BF16, cuda) and not skinny_linear.pays(9, 2048, 8192, BF16, cuda)


def test_llama_1b_fills_the_machine_once() -> None:
    """The plans that were the best of those measured on 132 multiprocessors, by the rule."""
    shapes = {"qkv": (NORM_LINEAR, 3072, 2048), "o": (LINEAR_ADD, 2048, 2048)}
    shapes |= {"gate-up": (NORM_SWIGLU, 16384, 2048), "down": (LINEAR_ADD, 2048, 8192)}
    chosen = {name: choose_plan(form, 16, *shape, num_sms=132)[:2] for name, (form, *shape) in shapes.items()}
    assert chosen == {"qkv": (48, 2), "o": (64, 4), "gate-up": (128, 1), "down": (64, 4)}


def test_plans_that_were_found_run_where_they_were_found() -> None:
    for (family, (form, tokens, *shape)), fields in plan_table.plans().items():
        if family == skinny_plans.FAMILY:
            assert choose_plan(form, tokens, *shape, 132, True) == Plan(**fields)
            assert choose_plan(form, tokens - 3, *shape, 132, True) == Plan(**fields)  # in the same kernel


@pytest.mark.nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch with addresses that are not memory")
@pytest.mark.parametrize("fast_memory", (False, True))
@pytest.mark.parametrize("num_tokens", (1, 8, 16, 17, 32))
@pytest.mark.parametrize("shape", ("1b", "3b", "8b", "tiny"))
def test_plans_are_what_the_kernel_takes(shape: str, num_tokens: int, fast_memory: bool) -> None:
    c = shape_config(shape)
    products = [(NORM_LINEAR, c.qkv_size, c.hidden_size), (LINEAR_ADD, c.hidden_size, c.q_size)]
    products += [(NORM_SWIGLU, 2 * c.intermediate_size, c.hidden_size)]
    products += [(LINEAR_ADD, c.hidden_size, c.intermediate_size), (NORM_LINEAR, c.vocab_size, c.hidden_size)]
    for form, num_rows, size in (*products, (NORM_LINEAR, 16, 64)):
        plan = choose_plan(form, num_tokens, num_rows, size, 132, fast_memory)
        assert plan.tile_rows % 16 == 0 and min_tile_rows(num_tokens) <= plan.tile_rows <= 128
        given = {"num_tokens": num_tokens, "num_rows": num_rows, "size": size, "form": form} | plan._asdict()
        given |= {"residual": 4096} if form == LINEAR_ADD else {}
        with contextlib.suppress(RuntimeError):  # the checks are passed, and there is no GPU
            skinny_linear.library().product(**(GOOD | given))
