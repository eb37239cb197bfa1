"""Drawing tokens on the GPU, exactly as `llama3.sampling` defines it but for sums of probabilities (docs/sampling.md).

The kernels are `csrc/sampling/`. This file checks arguments, chooses how a row is cut, and registers the torch ops
`llama3::sample` and `llama3::sample_and_place`, which write into tensors that they are given, so that torch.compile and
CUDA graphs see plain mutating calls. Nothing waits for the GPU, and no scratch memory is needed.
"""

import functools
from types import ModuleType

import torch

from llama3.decode_state import DecodeState
from llama3.errors import UserError
from llama3.ops.tensor_error import wrong_tensor
from llama3.sampling import FLOAT_FIELDS, INTEGER_FIELDS, SamplingTensors

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # the numbers of sampling::Dtype
GREEDY, UNFILTERED, FILTERED = range(3)  # the numbers of sampling::Mode
RULES = FLOAT_FIELDS + INTEGER_FIELDS
MAX_BATCH = 65535
MIN_TOKENS_PER_BLOCK = 4096  # every thread has 8


def sample(
    logits: torch.Tensor,
    params: SamplingTensors,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    blocks_per_row: int = 0,
    overlap: bool = True,
) -> torch.Tensor:
    """Draw one token a row: logits [B, V] bf16, fp16 or fp32 (rows may be strided), positions int32 [B] -> int64 [B].

    `params` holds B rows; its flags all_greedy and any_filter must be true of them. `out` receives the tokens if given.
    `blocks_per_row`: thread blocks that share a row (1, 2, 4, 8 or 16; 0: chosen here); tokens do not depend on it.
    `overlap`: let the kernel be launched before the previous one on the stream has ended (where the GPU can).

    A row with NaN draws its first NaN, else a row with +inf its first +inf; a row of nothing but -inf draws token 0.
    Raises UserError naming the tensor and the shape expected; KernelBuildError if the kernels cannot be built.
    """
    batch = _check_logits("sample", logits)
    out = logits.new_empty(batch, dtype=torch.int64) if out is None else out
    rules = _rules("sample", params, batch)
    _check("sample", logits, positions=(positions, torch.int32, (batch,)), out=(out, torch.int64, (batch,)))
    _check_device("sample", logits, *rules, positions, out)
    torch.ops.llama3.sample(logits, rules, positions, out, _mode(params), blocks_per_row, overlap)
    return out


def sample_and_place(
    logits: torch.Tensor,
    params: SamplingTensors,
    state: DecodeState,
    out: torch.Tensor | None = None,
    *,
    forbid_early_stops: bool = False,
    blocks_per_row: int = 0,
    overlap: bool = True,
) -> torch.Tensor:
    """The end of a decode step in one launch: draw a token for each of the state's first B rows, and place it.

    logits [B, V] are those of the tokens at `state.positions`; a token is drawn for the position after, and stored as
    `state.place` does: rows whose token ended them, or was their last, go idle. A row that was idle draws nothing: its
    result is 0 and its state stays. With `forbid_early_stops`, the logits of stop ids that must not be drawn yet become
    -inf, in place, as `state.forbid_early_stops` does. The rest is as in `sample`.
    """
    batch = _check_logits("sample_and_place", logits)
    if batch > state.num_rows:
        raise UserError(f"sample_and_place: logits has {batch} rows, and the decode state only {state.num_rows}")
    out = logits.new_empty(batch, dtype=torch.int64) if out is None else out
    rules = _rules("sample_and_place", params, batch)
    _check("sample_and_place", logits, out=(out, torch.int64, (batch,)))
    tensors = (state.token_ids, state.positions, state.last_positions, state.first_stop_positions, state.stop_ids)
    _check_device("sample_and_place", logits, *rules, out, *tensors)
    options = (_mode(params), forbid_early_stops, blocks_per_row, overlap)
    torch.ops.llama3.sample_and_place(logits, rules, *(t[:batch] for t in tensors), out, *options)
    return out


@functools.cache
def library() -> ModuleType:
    """The compiled kernels, built on first use. Raises load_custom_kernels.KernelBuildError."""
    import load_custom_kernels

    return load_custom_kernels.load("sampling")


def choose_blocks_per_row(batch: int, vocab_size: int, num_sms: int, largest: int, filtered: bool) -> int:
    """A power of two up to `largest`: a multiprocessor for every block, if each block has something to do.

    Filters keep a block waiting for its neighbours often, so two small clusters a multiprocessor pay.
    """
    blocks = 1
    while 2 * blocks <= largest and vocab_size >= 2 * blocks * MIN_TOKENS_PER_BLOCK:
        room = 2 * num_sms if filtered and 2 * blocks <= 4 else num_sms
        if 2 * blocks * batch > room:
            break
        blocks *= 2
    return blocks


def _mode(params: SamplingTensors) -> int:
    return GREEDY if params.all_greedy else FILTERED if params.any_filter else UNFILTERED


def _check_logits(op: str, logits: torch.Tensor) -> int:
    """The number of rows."""
    if logits.dim() != 2 or logits.dtype not in DTYPES or logits.stride(1) != 1 or 0 in logits.shape:
        raise wrong_tensor(op, "logits", logits, "bfloat16, float16 or float32 [B, V] with contiguous columns")
    if logits.shape[0] > MAX_BATCH:
        raise UserError(f"{op}: logits has {logits.shape[0]} rows; at most {MAX_BATCH} are drawn in one call")
    return logits.shape[0]


def _rules(op: str, params: SamplingTensors, batch: int) -> list[torch.Tensor]:
    """The arrays of `params` in the order of RULES."""
    for name in RULES:
        tensor = getattr(params, name)
        dtype = torch.float32 if name in FLOAT_FIELDS else torch.int64
        _check(op, tensor, **{f"params.{name}": (tensor, dtype, (batch,))})
    return [getattr(params, name) for name in RULES]


def _check(op: str, logits: torch.Tensor, **expected: tuple[torch.Tensor, torch.dtype, tuple[int, ...]]) -> None:
    for name, (tensor, dtype, shape) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise wrong_tensor(op, name, tensor, f"contiguous {dtype} {list(shape)}")


def _check_device(op: str, logits: torch.Tensor, *others: torch.Tensor) -> None:
    for tensor in (logits, *others):
        if tensor.device.type not in ("cuda", "meta") or tensor.device != logits.device:
            raise UserError(f"{op}: tensors are on {logits.device} and {tensor.device}; all must be on one CUDA device")


@functools.cache
def _limits(device: torch.device) -> tuple[int, int, bool]:
    """(multiprocessors, most blocks a row, whether launches can overlap) of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    has_clusters = properties.major >= 9
    most = library().max_blocks_per_row if properties.major == 9 else library().portable_blocks_per_row
    return properties.multi_processor_count, most if has_clusters else 1, has_clusters


def _launch(
    logits: torch.Tensor,
    rules: list[torch.Tensor],
    positions: torch.Tensor,
    out: torch.Tensor,
    mode: int,
    blocks_per_row: int,
    overlap: bool,
    state: dict[str, int],
) -> None:
    batch, vocab_size = logits.shape
    num_sms, most_blocks, can_overlap = _limits(logits.device)
    if blocks_per_row > most_blocks:
        raise UserError(f"blocks_per_row is {blocks_per_row}; this GPU runs at most {most_blocks}")
    with torch.cuda.device(logits.device):
        library().sample(
            logits=logits.data_ptr(),
            stride_logits_row=logits.stride(0),
            batch=batch,
            vocab_size=vocab_size,
            dtype=DTYPES[logits.dtype],
            rules=library().Rules(**{name: t.data_ptr() for name, t in zip(RULES, rules, strict=True)}),
            positions=positions.data_ptr(),
            out=out.data_ptr(),
            state=library().State(**state),
            mode=mode,
            blocks_per_row=blocks_per_row
            or choose_blocks_per_row(batch, vocab_size, num_sms, most_blocks, mode == FILTERED),
            overlap=overlap and can_overlap,
            stream=torch.cuda.current_stream().cuda_stream,
        )


torch.library.define(
    "llama3::sample",
    "(Tensor logits, Tensor[] rules, Tensor positions, Tensor(a!) out, int mode, int blocks_per_row, bool overlap) "
    "-> ()",
)
torch.library.define(
    "llama3::sample_and_place",
    "(Tensor(a!) logits, Tensor[] rules, Tensor(b!) token_ids, Tensor(c!) positions, Tensor last_positions, "
    "Tensor first_stop_positions, Tensor stop_ids, Tensor(d!) out, int mode, bool forbid_early_stops, "
    "int blocks_per_row, bool overlap) -> ()",
)


@torch.library.register_fake("llama3::sample")
def _sample_fake(*args: object) -> None:
    """Writes `out` alone."""


@torch.library.register_fake("llama3::sample_and_place")
def _sample_and_place_fake(*args: object) -> None:
    """Writes the tensors that its signature marks."""


@torch.library.impl("llama3::sample", "CUDA")
def _sample(
    logits: torch.Tensor,
    rules: list[torch.Tensor],
    positions: torch.Tensor,
    out: torch.Tensor,
    mode: int,
    blocks_per_row: int,
    overlap: bool,
) -> None:
    _launch(logits, rules, positions, out, mode, blocks_per_row, overlap, {})


@torch.library.impl("llama3::sample_and_place", "CUDA")
def _sample_and_place(
    logits: torch.Tensor,
    rules: list[torch.Tensor],
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    last_positions: torch.Tensor,
    first_stop_positions: torch.Tensor,
    stop_ids: torch.Tensor,
    out: torch.Tensor,
    mode: int,
    forbid_early_stops: bool,
    blocks_per_row: int,
    overlap: bool,
) -> None:
    state = {
        "token_ids": token_ids.data_ptr(),
        "positions": positions.data_ptr(),
        "last_positions": last_positions.data_ptr(),
        "first_stop_positions": first_stop_positions.data_ptr(),
        "stop_ids": stop_ids.data_ptr(),
        "num_stop_ids": stop_ids.shape[1],
        "forbid_early_stops": int(forbid_early_stops),
    }
    _launch(logits, rules, positions, out, mode, blocks_per_row, overlap, state)
