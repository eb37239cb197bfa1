"""Which sequences run in the next step: a queue, a fixed number of rows, and prefills in groups.

Prefilling in groups keeps decode steps full: a row that frees up waits until several have, or until nothing else runs.
"""

from collections import deque
from dataclasses import dataclass, field

from llama3.sequence import Sequence

REFILL_FRACTION = 8


@dataclass
class PrefillWork:
    """One prefill call: sequence i gets `counts[i]` more prompt tokens in row `rows[i]`.

    followers[i]: sequences of the same prompt, with their rows, that take over its cache when it is complete.
    """

    sequences: list[Sequence] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    followers: list[list[tuple[Sequence, int]]] = field(default_factory=list)

    def placements(self) -> list[tuple[Sequence, int]]:
        """Every sequence in this call with its row, followers included."""
        return list(zip(self.sequences, self.rows, strict=True)) + [pair for group in self.followers for pair in group]


class Scheduler:
    """Rows and the queue for them. `token_budget` bounds the prompt tokens of one prefill call."""

    def __init__(self, num_rows: int, token_budget: int) -> None:
        self.num_rows, self.token_budget = num_rows, token_budget
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}  # row -> sequence, prompts only partly prefilled included
        self._partial: PrefillWork | None = None

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def release(self, row: int) -> None:
        del self.running[row]

    def next_prefill(self) -> PrefillWork | None:
        """The next prefill call, or None if it is better to decode first."""
        if self._partial is not None:
            work, self._partial = self._partial, None
            return self._cut(work)
        free = [row for row in range(self.num_rows) if row not in self.running]
        if not self.waiting or not free:
            return None
        # Waiting sequences that would all fit now need not wait for more rows.
        if self.running and len(free) < min(max(1, self.num_rows // REFILL_FRACTION), len(self.waiting)):
            return None
        work, tokens = PrefillWork(), 0
        for row in free:
            if not self.waiting or tokens >= self.token_budget:
                break
            sequence = self.waiting[0]
            leader = work.sequences[-1] if work.sequences else None
            if leader is not None and leader.request == sequence.request:
                work.followers[-1].append((sequence, row))
            elif tokens and tokens + len(sequence.prompt_ids) > self.token_budget:
                break
            else:
                work.sequences.append(sequence)
                work.rows.append(row)
                work.counts.append(len(sequence.prompt_ids))
                work.followers.append([])
                tokens += len(sequence.prompt_ids)
            self.running[row] = self.waiting.popleft()
        return self._cut(work)

    def _cut(self, work: PrefillWork) -> PrefillWork:
        """A prompt longer than the budget, which is always alone in its call, goes in pieces."""
        remaining = len(work.sequences[0].prompt_ids) - work.sequences[0].num_prefilled
        if remaining > self.token_budget:
            self._partial = work
            return PrefillWork(work.sequences, work.rows, [self.token_budget], work.followers)
        if len(work.sequences) == 1:
            work.counts = [remaining]
        return work
