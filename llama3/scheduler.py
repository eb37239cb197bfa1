"""Which sequences run in the next step: a queue, a fixed number of places, and prefills in groups.

Prefilling in groups keeps decode steps full: a place that frees up waits until several have, or until nothing else
runs. A place is a cache slot, where the sequence's keys and values lie until it ends, and a row of the decode batch,
which may change when the batch shrinks.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field

from llama3.sequence import Sequence

REFILL_FRACTION = 8
# The batch is closed up when this part of its rows is in use and nothing waits: each batch size costs a capture.
SHRINK_FRACTION = 2


@dataclass
class PrefillWork:
    """One prefill call: sequence i gets `counts[i]` more of its prompt's tokens.

    followers[i]: sequences of the same prompt, which take over its cache when it is complete.
    """

    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    followers: list[list[Sequence]] = field(default_factory=list)

    def placed(self) -> list[Sequence]:
        """Every sequence in this call, followers included."""
        return self.sequences + [follower for group in self.followers for follower in group]


class Scheduler:
    """Places and the queue for them. `token_budget` bounds the prompt tokens of one prefill call."""

    def __init__(self, num_places: int, token_budget: int) -> None:
        self.num_places, self.token_budget = num_places, token_budget
        self.waiting: deque[Sequence] = deque()
        # A dictionary for its order and its speed; those only partly prefilled are included.
        self.running: dict[Sequence, None] = {}
        self._free_slots = deque(range(num_places))
        self._free_rows = list(range(num_places))  # a heap: the lowest rows first keep the batch short
        self._partial: PrefillWork | None = None

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's place back, unless it has been already, or take it out of the queue."""
        if sequence in self.running:
            del self.running[sequence]
            self._free_slots.append(sequence.slot)
            heapq.heappush(self._free_rows, sequence.row)
        elif sequence.row < 0 and sequence in self.waiting:  # never placed; the queue may be too long to search in vain
            self.waiting.remove(sequence)

    def close_up(self) -> list[int] | None:
        """If few rows are left in use and nothing waits, move the running sequences to rows 0, 1, ...

        Returns the rows that they leave, in that order, or None if all stay where they are.
        """
        num_rows = max((s.row for s in self.running), default=-1) + 1
        if self.waiting or self._partial is not None or len(self.running) * SHRINK_FRACTION > num_rows:
            return None
        self.running = dict.fromkeys(sorted(self.running, key=lambda s: s.row))
        old_rows = [sequence.row for sequence in self.running]
        for row, sequence in enumerate(self.running):
            sequence.row = row
        self._free_rows = list(range(len(self.running), self.num_places))
        return old_rows or None

    def next_prefill(self) -> PrefillWork | None:
        """The next prefill call, or None if it is better to decode first."""
        if self._partial is not None:
            work, self._partial = self._partial, None
            return self._cut(work)
        free = len(self._free_slots)
        if not self.waiting or not free:
            return None
        # Waiting sequences that would all fit now need not wait for more places.
        if self.running and free < min(max(1, self.num_places // REFILL_FRACTION), len(self.waiting)):
            return None
        work, tokens = PrefillWork(), 0
        while self.waiting and self._free_slots and tokens < self.token_budget:
            sequence = self.waiting[0]
            leader = work.sequences[-1] if work.sequences else None
            if leader is not None and leader.request == sequence.request:
                work.followers[-1].append(sequence)
            elif tokens and tokens + len(sequence.prompt_ids) > self.token_budget:
                break
            else:
                work.sequences.append(sequence)
                work.counts.append(len(sequence.prompt_ids))
                work.followers.append([])
                tokens += len(sequence.prompt_ids)
            self.running[self.waiting.popleft()] = None
            sequence.slot, sequence.row = self._free_slots.popleft(), heapq.heappop(self._free_rows)
        return self._cut(work)

    def _cut(self, work: PrefillWork) -> PrefillWork:
        """A prompt longer than the budget, which is always alone in its call, goes in pieces."""
        remaining = len(work.sequences[0].prompt_ids) - work.sequences[0].num_prefilled
        if remaining > self.token_budget:
            self._partial = work
            return PrefillWork(work.sequences, [self.token_budget], work.followers)
        if len(work.sequences) == 1:
            work.counts = [remaining]
        return work
