"""What the Python side of the one-kernel products hands to the compiled one, seen without a GPU."""

from types import ModuleType, SimpleNamespace

import pytest
import torch

from llama3.ops import batch_linear, elementwise, one_kernel, skinny_linear
from llama3.ops.norm_parts import NormParts
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU


class FakeCuda(torch.Tensor):
    """In the host's memory, and says that it is not."""

    is_cuda = True


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(one_kernel, "num_sms", lambda device: 132)
    monkeypatch.setattr(one_kernel, "has_fast_memory", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    shapes = {"x": (20, 512), "weight": (256, 512), "norm": (512,), "residual": (20, 256), "next_norm": (256,)}
    return {name: torch.zeros(shape, dtype=torch.bfloat16).as_subclass(FakeCuda) for name, shape in shapes.items()}


@pytest.mark.nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch on the host's memory")
@pytest.mark.parametrize("family", (skinny_linear, batch_linear))
def test_the_compiled_side_takes_what_the_python_side_hands_it(
    family: ModuleType, operands: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, norm, residual, next_norm = operands.values()
    parts = NormParts(x, torch.zeros(3, 20))
    monkeypatch.setattr(elementwise, "norm_parts", None)  # another kernel
    calls = (
        lambda: family.norm_linear(x, norm, weight, 1e-5, parts),
        lambda: family.norm_swiglu(x, norm, weight, 1e-5, parts),
        lambda: family.linear_add(x, weight, residual),
        lambda: family.linear_add_norm(x, weight, residual, next_norm),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="cuda"):  # its checks are passed; then there is no GPU
            call()


def test_arguments_and_the_output(operands: dict) -> None:
    x, weight, norm, residual, _ = operands.values()
    out, plain = one_kernel.arguments("norm_linear", x, weight, norm, None, 1e-5, None)
    assert out.shape == (20, 256) and plain["out"] == out.data_ptr() and plain["norm"] == norm.data_ptr()
    assert plain["form"] == NORM_LINEAR and plain["residual"] == 0 and plain["overlap"] is True
    assert [plain[name] for name in ("num_tokens", "num_rows", "size", "eps")] == [20, 256, 512, 1e-5]
    out, halved = one_kernel.arguments("norm_swiglu", x, weight, norm, None, 1e-5, None)
    assert out.shape == (20, 128) and halved["form"] == NORM_SWIGLU
    out, added = one_kernel.arguments("linear_add", x, weight, None, residual, 0.0, residual)
    assert out is residual and added["out"] == added["residual"] == residual.data_ptr()
    assert added["form"] == LINEAR_ADD and added["norm"] == 0
