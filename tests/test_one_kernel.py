"""What the Python side of the one-kernel products hands to the compiled one, seen without a GPU."""

from types import ModuleType, SimpleNamespace

import pytest
import torch

from llama3.errors import UserError
from llama3.ops import batch_linear, one_kernel, skinny_linear
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU


class FakeCuda(torch.Tensor):
    """In the host's memory, and says that it is not."""

    is_cuda = True


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(one_kernel, "num_sms", lambda device: 132)
    monkeypatch.setattr(one_kernel, "has_fast_memory", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    shapes = {"x": (20, 512), "weight": (256, 512), "residual": (20, 256)}
    return {name: torch.zeros(shape, dtype=torch.bfloat16).as_subclass(FakeCuda) for name, shape in shapes.items()}


@pytest.mark.nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch on the host's memory")
@pytest.mark.parametrize("family", (skinny_linear, batch_linear))
def test_the_compiled_side_takes_what_the_python_side_hands_it(family: ModuleType, operands: dict) -> None:
    x, weight, residual = operands.values()
    squares = torch.zeros(3, 20)
    calls = (
        lambda: family.norm_linear(x, weight, 1e-5, squares),
        lambda: family.norm_swiglu(x, weight, 1e-5, squares),
        lambda: family.linear_add(x, weight, residual),
        lambda: family.linear_add_squares(x, weight, residual),
    )
    if family is batch_linear:
        calls += (lambda: family.linear(x, weight),)
    for call in calls:
        with pytest.raises(RuntimeError, match="cuda"):  # its checks are passed; then there is no GPU
            call()


@pytest.mark.nvcc
@pytest.mark.parametrize(("family", "most"), ((skinny_linear, 32), (batch_linear, 128)))
def test_too_many_tokens_are_named(family: ModuleType, most: int, operands: dict) -> None:
    x = torch.zeros(most + 1, 512, dtype=torch.bfloat16).as_subclass(FakeCuda)
    with pytest.raises(ValueError, match=f"num_tokens is {most + 1}; supported: 1 to {most}"):
        family.linear_add(x, operands["weight"], torch.zeros(most + 1, 256, dtype=x.dtype).as_subclass(FakeCuda))


def test_arguments_and_the_output(operands: dict) -> None:
    x, weight, residual = operands.values()
    out, plain = one_kernel.arguments("norm_linear", x, weight, None, 1e-5, None)
    assert out.shape == (20, 256) and plain["out"] == out.data_ptr()
    assert plain["form"] == NORM_LINEAR and plain["residual"] == 0 and plain["overlap"] is True
    assert [plain[name] for name in ("num_tokens", "num_rows", "size", "eps")] == [20, 256, 512, 1e-5]
    out, halved = one_kernel.arguments("norm_swiglu", x, weight, None, 1e-5, None)
    assert out.shape == (20, 128) and halved["form"] == NORM_SWIGLU
    out, added = one_kernel.arguments("linear_add", x, weight, residual, 0.0, residual)
    assert out is residual and added["out"] == added["residual"] == residual.data_ptr()
    assert added["form"] == LINEAR_ADD


@pytest.mark.parametrize(
    ("squares", "message"),
    [
        (torch.zeros(3, 20, dtype=torch.bfloat16), "squares is torch.bfloat16"),
        (torch.zeros(3, 21), r"expected contiguous torch.float32 \[P, 20\]"),
        (torch.zeros(20), r"expected contiguous torch.float32 \[P, 20\]"),
        (torch.zeros(20, 3).t(), "strides"),
        (torch.zeros(3, 20, device="meta"), "squares is on meta; expected cpu"),
    ],
)
def test_wrong_sums_of_squares_are_named(squares: torch.Tensor, message: str) -> None:
    x = torch.zeros(20, 512)
    with pytest.raises(UserError, match=message):
        one_kernel.squares_argument("norm_linear", squares, x)
    right = torch.zeros(3, 20)
    assert one_kernel.squares_argument("norm_linear", right, x) == {"squares": right.data_ptr(), "count": 3}
    assert one_kernel.squares_argument("norm_linear", None, x) == {"squares": 0, "count": 0}
