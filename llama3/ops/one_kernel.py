"""What the families of kernels that run a whole product op have in common: `skinny_linear`, `batch_linear`.

The weight of a norm before a product is part of the product's (`ModelWeights.fold_norms`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from llama3.device import is_hopper
from llama3.errors import UserError
from llama3.ops.tensor_error import wrong_tensor

NORM_LINEAR, LINEAR_ADD, NORM_SWIGLU, LINEAR = range(4)  # the numbers of common::Form
FORMS = {"norm_linear": NORM_LINEAR, "linear_add": LINEAR_ADD, "norm_swiglu": NORM_SWIGLU, "linear": LINEAR}
ROWS_MULTIPLE, SIZE_MULTIPLE = 16, 64
# GPUs of more memory, an H200 and not an H100, have faster memory as well: other kernels are then the fastest.
FAST_MEMORY_BYTES = 100 << 30
HEAD_ELEMENTS = 150 << 20  # products of so many weights are the head's, in models that fit on one GPU


class Plan(Protocol):
    """A family's NamedTuple of what the compiled side takes by keyword."""

    def _asdict(self) -> dict[str, Any]: ...


def takes(num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run x [T, size] times weight [num_rows, size] here, and it is not the head's product."""
    return runs(num_rows, size, dtype, device) and not is_head(num_rows, size)


def runs(num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run x [T, size] times weight [num_rows, size] here."""
    suits = num_rows % ROWS_MULTIPLE == 0 and size % SIZE_MULTIPLE == 0 and dtype == torch.bfloat16
    return suits and is_hopper(device)


def is_head(num_rows: int, size: int) -> bool:
    return num_rows * size >= HEAD_ELEMENTS


def arguments(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The output [T, N] or [T, N / 2], made if not given, and what both families' `product` takes by keyword.

    Raises UserError naming the tensor and the shape expected.
    """
    form = FORMS[op]
    if x.dim() != 2 or x.dtype != torch.bfloat16 or not x.is_contiguous():
        raise wrong_tensor(op, "x", x, "contiguous torch.bfloat16 [T, K]")
    num_tokens, size = x.shape
    num_rows = weight.shape[0]
    num_outputs = num_rows // 2 if form == NORM_SWIGLU else num_rows
    if out is None:
        out = x.new_empty(num_tokens, num_outputs)
    expected: dict[str, tuple[torch.Tensor | None, tuple[int, int]]]
    expected = {"weight": (weight, (num_rows, size)), "out": (out, (num_tokens, num_outputs))}
    expected |= {"residual": (residual, (num_tokens, num_rows))}
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise wrong_tensor(op, name, tensor, f"contiguous {x.dtype} {list(shape)}")
    tensors = {"x": x, **{name: tensor for name, (tensor, _) in expected.items()}}
    for name, tensor in tensors.items():
        if tensor is not None and (not tensor.is_cuda or tensor.device != x.device):
            raise UserError(f"{op}: {name} is on {tensor.device}; expected a CUDA device, the same for every tensor")
    pointers = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    sizes = {"num_tokens": num_tokens, "num_rows": num_rows, "size": size, "eps": eps, "form": form}
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return out, pointers | sizes | {"overlap": True, "stream": stream}


def with_plan(
    arguments: dict[str, Any], plan: Plan | None, choose_plan: Callable[..., Plan], device: torch.device
) -> dict[str, Any]:
    """`arguments`, and how the product runs: as `plan` says, or, if it is None, as the family chooses for this GPU."""
    if plan is None:
        shape = (arguments[name] for name in ("form", "num_tokens", "num_rows", "size"))
        plan = choose_plan(*shape, num_sms(device), has_fast_memory(device))
    return arguments | plan._asdict()


def padded(num_tokens: int, counts: Sequence[int]) -> int:
    """Of the ascending token counts that kernels are compiled for, the one for `num_tokens`; of too many, the largest:
    the kernels refuse them."""
    return next((count for count in counts if count >= num_tokens), counts[-1])


def squares_argument(op: str, squares: torch.Tensor | None, x: torch.Tensor) -> dict[str, int]:
    """What the kernels take by keyword for sums of squares of x's tokens, or of as many, fp32 [P, T]; or for none."""
    if squares is None:
        return {"squares": 0, "count": 0}
    if squares.dtype != torch.float32 or squares.shape[1:] != x.shape[:1] or not squares.is_contiguous():
        raise wrong_tensor(op, "squares", squares, f"contiguous torch.float32 [P, {x.shape[0]}]")
    if squares.device != x.device:
        raise UserError(f"{op}: squares is on {squares.device}; expected {x.device}, as the other tensors")
    return {"squares": squares.data_ptr(), "count": squares.shape[0]}


@functools.cache
def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_fast_memory(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).total_memory > FAST_MEMORY_BYTES
