"""What a decode step reads and writes besides weights and cache: arrays with one row a sequence, at fixed addresses.

Because nothing here ever moves, one captured graph serves every step; the host only rewrites rows between steps.
"""

from collections.abc import Sequence as Rows
from dataclasses import replace
from itertools import chain

import torch

from llama3.device import to_device
from llama3.sampling import FLOAT_FIELDS, INTEGER_FIELDS, SamplingTensors
from llama3.sampling_params import SamplingParams
from llama3.sequence import Sequence

IDLE = -1
MAX_TOP_K = 2**31 - 1  # beyond any vocabulary
MIN_TEMPERATURE = 1e-30  # as good as greedy, and no logit becomes infinite by it


class DecodeState:
    """Rows 0 .. num_rows - 1 of a batch.

    token_ids: int64 [R], the token to feed next. positions: int32 [R], where it goes; IDLE marks an empty row.
    last_positions: int32 [R], the last position that may be fed. slots: int32 [R], the cache slot of the row's
    sequence. stop_ids: int64 [R, S], padded with -1. first_stop_positions: int32 [R], where a stop token may first
    be drawn.
    """

    def __init__(self, num_rows: int, max_stop_ids: int, device: torch.device) -> None:
        self.num_rows, self.max_stop_ids, self.device = num_rows, max_stop_ids, device
        self.token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.positions = torch.full((num_rows,), IDLE, dtype=torch.int32, device=device)
        self.last_positions = torch.full((num_rows,), IDLE, dtype=torch.int32, device=device)
        self.first_stop_positions = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.slots = torch.arange(num_rows, dtype=torch.int32, device=device)
        self.stop_ids = torch.full((num_rows, max_stop_ids), -1, dtype=torch.int64, device=device)
        self.sampling = SamplingTensors.allocate(num_rows, device)

    def assign(self, sequences: Rows[Sequence]) -> None:
        """Give their rows to new sequences. They stay idle until `place` gives them a first token."""
        params = [sequence.params for sequence in sequences]
        integers: list[tuple[torch.Tensor, list[int]]] = [
            (self.sampling.top_k, [min(max(p.top_k, 0), MAX_TOP_K) for p in params]),
            (self.sampling.seed, [s.seed for s in sequences]),
            (self.sampling.request, [s.rng_request for s in sequences]),
            (self.sampling.sample, [s.sample for s in sequences]),
            (self.last_positions, [s.max_context_len - 1 for s in sequences]),
            (
                self.first_stop_positions,
                [len(s.prompt_ids) + min(s.params.min_tokens, s.max_tokens) for s in sequences],
            ),
            (self.slots, [s.slot for s in sequences]),
        ]
        floats = (self.sampling.temperature, self.sampling.top_p, self.sampling.min_p)
        stop_ids = [token for s in sequences for token in self._padded(s.stop_ids)]
        # Few copies, because each costs the host more than the device: one of integers, one of floats.
        rows = [s.row for s in sequences]
        sizes = [len(rows)] * (1 + len(integers)) + [len(stop_ids)]
        values = [*rows, *chain.from_iterable(numbers for _, numbers in integers), *stop_ids]
        packed = self._tensor(values, torch.int64).split(sizes)
        index = packed[0]
        for (target, _), column in zip(integers, packed[1:-1], strict=True):
            target[index] = column.to(target.dtype)
        rules = self._tensor([[_temperature(p), p.top_p, p.min_p] for p in params], torch.float32)
        for target, column in zip(floats, rules.unbind(1), strict=True):
            target[index] = column
        self.stop_ids[index] = packed[-1].view(len(rows), self.max_stop_ids)
        self.positions.index_fill_(0, index, IDLE)

    def _padded(self, stop_ids: frozenset[int]) -> list[int]:
        return sorted(stop_ids) + [-1] * (self.max_stop_ids - len(stop_ids))

    def close_up(self, old_rows: Rows[int]) -> None:
        """Move `old_rows` to rows 0, 1, ...; the rows after them go idle."""
        index = self._tensor(list(old_rows), torch.int64)
        own = (
            self.token_ids,
            self.positions,
            self.last_positions,
            self.first_stop_positions,
            self.slots,
            self.stop_ids,
        )
        sampling = (getattr(self.sampling, name) for name in INTEGER_FIELDS + FLOAT_FIELDS)
        for array in (*own, *sampling):
            array[: len(old_rows)] = array[index]
        self.positions[len(old_rows) :] = IDLE

    def release(self, rows: Rows[int]) -> None:
        """Make rows idle, so that steps to come neither read nor write their slots."""
        self.positions.index_fill_(0, self._tensor(list(rows), torch.int64), IDLE)

    def place(self, rows: torch.Tensor | slice, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Store the tokens drawn for `rows` at `positions`; rows whose token ended them, or was their last, go idle."""
        ended = (token_ids[:, None] == self.stop_ids[rows]).any(-1) & (positions >= self.first_stop_positions[rows])
        ended |= positions > self.last_positions[rows]
        self.token_ids[rows] = token_ids
        self.positions[rows] = torch.where(ended, IDLE, positions)

    def forbid_early_stops(self, logits: torch.Tensor, rows: torch.Tensor | slice, positions: torch.Tensor) -> None:
        """In place: no stop token can be drawn at a position before the row's min_tokens. logits [B, V]."""
        stop_ids = self.stop_ids[rows]
        early = (positions < self.first_stop_positions[rows])[:, None] & (stop_ids >= 0)
        penalty = torch.where(early, -torch.inf, 0.0).to(logits.dtype)
        logits.scatter_add_(1, stop_ids.clamp(min=0), penalty)

    def with_flags(self, all_greedy: bool, any_filter: bool) -> SamplingTensors:
        """The sampling arrays, with what the host knows of the rows now in use."""
        return replace(self.sampling, all_greedy=all_greedy, any_filter=any_filter)

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return to_device(values, dtype, self.device)


def _temperature(params: SamplingParams) -> float:
    return max(params.temperature, MIN_TEMPERATURE) if params.temperature else 0.0
