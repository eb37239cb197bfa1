"""All products between one layer's attention and the next one's in one launch (`csrc/layer_products/`), for the tokens
of a decode step. Checks, allocation and launch.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from llama3.device import is_hopper
from llama3.errors import UserError
from llama3.ops.one_kernel import LINEAR_ADD, NORM_LINEAR, NORM_SWIGLU, num_sms
from llama3.ops.tensor_error import wrong_tensor

OP = "layer_products"
MIN_TOKENS, MAX_TOKENS = 2, 128
UNIT_ROWS, SIZE_MULTIPLE = 16, 64
TRIGGER = 40408  # steps that a block has left to ask for when the next kernel may start


class Workspace(NamedTuple):
    """What the blocks of one launch at a time on a device exchange; `words` starts as zeros and keeps its contents."""

    words: torch.Tensor  # int32
    sums: torch.Tensor  # float32


def layer_products(
    attn: torch.Tensor,
    residual: torch.Tensor,
    o: torch.Tensor,
    mlp_norm: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    eps: float,
    next_norm: torch.Tensor | None = None,
    next_weight: torch.Tensor | None = None,
    *,
    workspace: Workspace | None = None,
    blocks: int = 0,
    trigger: int = TRIGGER,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """attn [T, A], residual [T, H] -> hidden states [T, H] after the layer, and with next_norm [H] and next_weight
    [N, H] their product [T, N].

    mid = residual + attn o^T; hidden = mid + SwiGLU(RMSNorm(mid) gate_up^T) down^T; RMSNorm(hidden) next_weight^T;
    o [H, A], mlp_norm [H], gate_up [2 F, H] as norm_swiglu takes it, down [H, F]. T is at most 128. Contiguous bf16 on
    one CUDA device of compute capability 9.0. Weights and norms are read before the previous kernel has ended: an
    earlier one must have written them.

    workspace: launches that may run at the same time need different ones; by default there is one a stream, and one for
    all captured graphs. blocks: at most one a multiprocessor (0: so many). Raises UserError naming the tensor and the
    shape expected; KernelBuildError if the kernel cannot be built.
    """
    device, num_tokens, hidden_size, size = attn.device, attn.shape[0], residual.shape[-1], gate_up.shape[0] // 2
    _check("attn", attn, attn.shape[:1] + o.shape[1:], attn)
    expected = {
        "residual": (residual, (num_tokens, hidden_size)),
        "o": (o, (hidden_size, attn.shape[1])),
        "mlp_norm": (mlp_norm, (hidden_size,)),
        "gate_up": (gate_up, (2 * size, hidden_size)),
        "down": (down, (hidden_size, size)),
    }
    if next_norm is not None and next_weight is not None:
        expected["next_norm"] = next_norm, (hidden_size,)
        expected["next_weight"] = next_weight, (next_weight.shape[0], hidden_size)
    elif next_norm is not None or next_weight is not None:
        raise UserError(f"{OP}: next_norm and next_weight go together; one of them is missing")
    for name, (tensor, shape) in expected.items():
        _check(name, tensor, shape, attn)
    if not attn.is_cuda:
        raise UserError(f"{OP}: attn is on {device}; expected a CUDA device")
    blocks = blocks or num_sms(device)
    workspace = workspace or _workspace(device)
    padded = library().padded_tokens(num_tokens)
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise wrong_tensor(OP, "attn", attn, f"1 to {MAX_TOKENS} tokens")
    if workspace.sums.numel() < library().sums(blocks, num_tokens):
        raise UserError(f"{OP}: the workspace is for another GPU; expected make_workspace({str(device)!r})")

    def add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor | None):
        out = torch.empty_like(residual)
        if norm is None:
            return out, None, None, _product(LINEAR_ADD, x, weight, out, residual=residual)
        normed = torch.empty_like(out)
        squares = torch.empty(hidden_size // UNIT_ROWS, padded, dtype=torch.float32, device=device)
        given = {"residual": residual, "norm": norm, "normed": normed, "squares": squares}
        return out, normed, squares, _product(LINEAR_ADD, x, weight, out, **given)

    middle, normed, squares, first = add(attn, o, residual, mlp_norm)
    activated = attn.new_empty(num_tokens, size)
    second = _product(NORM_SWIGLU, normed, gate_up, activated, squares=squares)
    hidden, last_normed, last_squares, third = add(activated, down, middle, next_norm)
    products, out = [first, second, third], None
    if next_weight is not None:
        out = attn.new_empty(num_tokens, next_weight.shape[0])
        products.append(_product(NORM_LINEAR, last_normed, next_weight, out, squares=last_squares))
    with torch.cuda.device(device):
        library().launch(
            products,
            num_tokens=num_tokens,
            eps=eps,
            words=workspace.words.data_ptr(),
            sums=workspace.sums.data_ptr(),
            blocks=blocks,
            trigger=trigger,
            overlap=True,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return hidden, out


def pays(num_tokens: int, *weights: torch.Tensor) -> bool:
    """Whether the kernel runs so many tokens over these weights, and is the fastest (docs/cuda-ops.md)."""
    return MIN_TOKENS <= num_tokens <= MAX_TOKENS and all(
        weight.dim() == 2
        and weight.dtype == torch.bfloat16
        and weight.shape[0] % UNIT_ROWS == 0
        and weight.shape[1] % SIZE_MULTIPLE == 0
        and weight.is_contiguous()
        and is_hopper(weight.device)
        for weight in weights
    )


def make_workspace(device: torch.device | str = "cuda") -> Workspace:
    """For one launch at a time on `device`."""
    device = torch.device(device)
    blocks = num_sms(device)
    words = torch.zeros(library().words, dtype=torch.int32, device=device)
    return Workspace(words, torch.full((library().sums(blocks, MAX_TOKENS),), -1, dtype=torch.int32, device=device))


@functools.cache
def library() -> ModuleType:
    """The compiled kernel, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load(OP)


_workspaces: dict[tuple[torch.device, int | str], Workspace] = {}


def _workspace(device: torch.device) -> Workspace:
    """The default workspace of the current stream, or the one that all captured graphs of the device share."""
    capturing = torch.cuda.is_current_stream_capturing()
    key = (device, "capture" if capturing else torch.cuda.current_stream(device).cuda_stream)
    if key not in _workspaces:
        if capturing:  # an allocation now would belong to the graph
            raise UserError(f"{OP} was captured before its first run: run it once, or pass workspace=make_workspace()")
        _workspaces[key] = make_workspace(device)
        _workspaces.setdefault((device, "capture"), make_workspace(device))
    return _workspaces[key]


def _product(form: int, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, **others: torch.Tensor):
    pointers = {name: tensor.data_ptr() for name, tensor in others.items()}
    return library().Product(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        num_rows=weight.shape[0],
        size=weight.shape[1],
        form=form,
        **pointers,
    )


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    same = tuple(tensor.shape) == tuple(shape) and tensor.device == like.device
    if not same or tensor.dtype != torch.bfloat16 or not tensor.is_contiguous():
        raise wrong_tensor(OP, name, tensor, f"contiguous torch.bfloat16 {list(shape)} on {like.device}")
