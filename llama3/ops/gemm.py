"""Matrix products of many tokens on Hopper's tensor cores, with what follows them fused: `csrc/gemm/`.

Every function raises UserError naming the tensor and the shape expected, and KernelBuildError if the kernels cannot be
built. Tensors are contiguous, 16-byte aligned, bf16 or fp16 on one CUDA device of compute capability 9.0. Products
on one device must run one after the other, not on two streams at once: they share scratch memory.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from llama3.device import is_hopper
from llama3.errors import UserError
from llama3.ops.elementwise import DTYPES
from llama3.ops.one_kernel import num_sms
from llama3.ops.tensor_error import wrong_tensor

PLAIN, RESIDUAL, SWIGLU = range(3)  # the numbers of gemm::Epilogue
TILE = 256  # tokens of most tiles of two multiprocessors, and weight rows of the tallest
BLOCK_TOKENS = TILE // 2
STAGE_COLUMNS = 64
MUCH_LESS = 0.95  # of the work: tiles of fewer rows read x more often
MIN_WIDE_ROUNDS, MIN_WIDE_SIZE = 16, 4096  # where WIDE, which takes less energy, was seen to take less time
MIN_OCCUPANCY = 0.85  # with more of the GPU idle in the last round of tiles, cuBLASLt's smaller tiles win


class Plan(NamedTuple):
    """How a product runs: weight rows of a tile; in how many parts its inner dimension is split, each of which takes
    two multiprocessors, all parts of all tiles at the same time; the tokens of a multiprocessor's tile."""

    rows: int = TILE
    splits: int = 1
    tokens: int = BLOCK_TOKENS


WHOLE = Plan()
WIDE = Plan(192, 1, 2 * BLOCK_TOKENS)  # a fifth fewer bytes into a multiprocessor for the same product
# What the kernels are compiled for, in bf16: in fp16 it is WHOLE alone.
PLANS: dict[int, tuple[Plan, ...]] = {
    PLAIN: (WHOLE, WIDE, Plan(192), Plan(128), Plan(256, 2), Plan(192, 2), Plan(128, 2), Plan(256, 4)),
    RESIDUAL: (WHOLE, WIDE, Plan(192), Plan(128), Plan(256, 2), Plan(128, 2), Plan(256, 4)),
    SWIGLU: (WHOLE, WIDE, Plan(224)),
}


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("gemm")


def clusters_at_once(device: torch.device) -> int:
    """How many pairs of multiprocessors it has, each of which works on one tile at a time."""
    return num_sms(device) // 2


def suits(device: torch.device, num_tokens: int, num_rows: int, size: int) -> bool:
    """Whether x [num_tokens, size] times weight [num_rows, size] can run here, and keeps the device busy to its end."""
    if not is_hopper(device) or num_rows % 8 or size % 8:
        return False
    # Tokens that only pad the last tile are idle time as well.
    tiles = _parts(WHOLE, num_tokens, num_rows)
    busy = num_tokens * num_rows / TILE**2 / tiles * _occupancy(tiles, clusters_at_once(device))
    return busy >= MIN_OCCUPANCY


def compiled(epilogue: int, dtype: torch.dtype) -> tuple[Plan, ...]:
    """The plans that there are kernels for."""
    return PLANS[epilogue] if dtype == torch.bfloat16 else (WHOLE,)


def plans_for_tokens(epilogue: int, dtype: torch.dtype, num_tokens: int) -> list[Plan]:
    """Those that give both multiprocessors of a cluster tokens; with 128 tokens or fewer none does."""
    return [plan for plan in compiled(epilogue, dtype) if num_tokens > plan.tokens]


def promising(
    epilogue: int, dtype: torch.dtype, num_tokens: int, num_rows: int, size: int, clusters: int
) -> list[Plan]:
    """The plans that keep a GPU with room for so many clusters of two multiprocessors busy to the end: one of them is
    the fastest, which is found by trying."""
    found = []
    for plan in plans_for_tokens(epilogue, dtype, num_tokens):
        parts = _parts(plan, num_tokens, num_rows)
        if _fits(plan, parts, size, clusters) and _occupancy(parts, clusters) >= MIN_OCCUPANCY:
            found.append(plan)
    return found


def default_plan(epilogue: int, dtype: torch.dtype, num_tokens: int, num_rows: int, size: int, clusters: int) -> Plan:
    """Where nothing was tried: tiles of 128 tokens by all rows, or of SwiGLU's the shorter ones where those save much
    of the work that each cluster does in turn. For long prompts of wide models tiles of 256 tokens."""
    known = compiled(epilogue, dtype)

    def rounds(plan: Plan) -> int:
        return -(-_parts(plan, num_tokens, num_rows) // clusters)

    def work(plan: Plan) -> int:
        return rounds(plan) * plan.rows * plan.tokens

    enough = size >= MIN_WIDE_SIZE and rounds(WIDE) >= MIN_WIDE_ROUNDS
    if WIDE in known and enough and work(WIDE) * MUCH_LESS <= work(WHOLE):
        return WIDE
    if epilogue != SWIGLU:
        return WHOLE
    best = min((plan for plan in known if plan.tokens == BLOCK_TOKENS), key=work)
    return best if work(best) <= MUCH_LESS * work(WHOLE) else WHOLE


def plans_for(epilogue: int, x: torch.Tensor, weight: torch.Tensor) -> list[Plan]:
    """`promising` for these tensors; none where the kernels do not run, or half of every cluster would idle."""
    num_tokens, num_rows, size = x.shape[0], *weight.shape
    if not is_hopper(x.device) or x.dtype not in DTYPES or num_rows % 8 or size % 8:
        return []
    return promising(epilogue, x.dtype, num_tokens, num_rows, size, clusters_at_once(x.device))


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """x [T, K] times weight [N, K], plus residual [T, N] if there is one -> [T, N]; summed in fp32, rounded once.

    In `out` if given, which may be the residual. `plan`: None leaves the choice to default_plan.
    """
    _check_operands("product", x, weight, 8)
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    if residual is not None and residual.shape != out.shape:
        raise wrong_tensor("product", "residual", residual, f"contiguous {x.dtype} {list(out.shape)}")
    return _launch("product", PLAIN if residual is None else RESIDUAL, x, weight, out, residual, plan)


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, plan: Plan | None = None) -> torch.Tensor:
    """silu(x gate) * (x up), x [T, K], gate_up [2 F, K] in groups of 8 gate rows and their 8 up rows -> [T, F]."""
    _check_operands("swiglu", x, gate_up, 16)
    return _launch("swiglu", SWIGLU, x, gate_up, x.new_empty(x.shape[0], gate_up.shape[0] // 2), None, plan)


def _parts(plan: Plan, num_tokens: int, num_rows: int) -> int:
    """Of all tiles: what the clusters share out."""
    return -(-num_tokens // (2 * plan.tokens)) * -(-num_rows // plan.rows) * plan.splits


def _occupancy(parts: int, clusters: int) -> float:
    return parts / (-(-parts // clusters) * clusters)


def _fits(plan: Plan, parts: int, size: int, clusters: int) -> bool:
    """Whether all parts run at once, and none is empty."""
    return plan.splits == 1 or (parts <= clusters and size > (plan.splits - 1) * STAGE_COLUMNS)


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    """Shared by all products in parts on a device: they run one after the other, each leaves it fit for the next."""
    if torch.cuda.is_current_stream_capturing():  # an allocation now would belong to the graph
        raise UserError("a product in parts was captured before the first one ran: run one before")
    return torch.zeros(library().workspace_bytes(clusters_at_once(device)), dtype=torch.uint8, device=device)


def _check_operands(op: str, x: torch.Tensor, weight: torch.Tensor, unit: int) -> None:
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] < 8 or x.shape[1] % 8:
        raise wrong_tensor(op, "x", x, "[T, K] with K a multiple of 8")
    if weight.dim() != 2 or weight.shape[0] < unit or weight.shape[0] % unit or weight.shape[1] != x.shape[1]:
        raise wrong_tensor(op, "weight", weight, f"[N, {x.shape[1]}] with N a multiple of {unit}")
    if x.dtype not in DTYPES:
        raise UserError(f"{op}: the kernels compute in bfloat16 or float16, not in {x.dtype}")


def _launch(
    op: str,
    epilogue: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    plan: Plan | None,
) -> torch.Tensor:
    for name, tensor in (("x", x), ("weight", weight), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise wrong_tensor(op, name, tensor, f"contiguous {x.dtype}, 16-byte aligned")
        if not is_hopper(tensor.device) or tensor.device != x.device:
            raise UserError(f"{op}: {name} is on {tensor.device}; expected a Hopper GPU, the same for every tensor")
    sizes = (x.shape[0], weight.shape[0], x.shape[1])
    plan = plan or default_plan(epilogue, x.dtype, *sizes, clusters_at_once(x.device))
    _check_plan(op, epilogue, plan, x, weight)
    workspace = _workspace(x.device) if plan.splits > 1 else None
    scratch = {"workspace": workspace.data_ptr(), "workspace_bytes": workspace.nbytes} if workspace is not None else {}
    operands = (x.data_ptr(), weight.data_ptr(), 0 if residual is None else residual.data_ptr(), out.data_ptr())
    stream = torch.cuda.current_stream(x.device).cuda_stream
    library().gemm(*operands, *sizes, epilogue, DTYPES[x.dtype], stream=stream, **plan._asdict(), **scratch)
    return out


def _check_plan(op: str, epilogue: int, plan: Plan, x: torch.Tensor, weight: torch.Tensor) -> None:
    known = compiled(epilogue, x.dtype)
    if plan not in known:
        raise UserError(f"{op}: there is no {plan} in {x.dtype}; choose from {', '.join(map(str, known))}")
    parts, clusters = _parts(plan, x.shape[0], weight.shape[0]), clusters_at_once(x.device)
    if not _fits(plan, parts, x.shape[1], clusters):
        raise UserError(
            f"{op}: {plan} makes {parts} parts of {x.shape[1]} columns; expected at most {clusters} parts, which run"
            f" at once, and more than {(plan.splits - 1) * STAGE_COLUMNS} columns"
        )
