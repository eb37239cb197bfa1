"""The engine: prefill, decode, finish, on token ids only. It knows nothing of text.

Steps are launched ahead of the host: while one group of tokens is being read back, the next is already computing.
"""

from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llama3.decode_state import DecodeState
from llama3.device import to_device
from llama3.kv_cache import BLOCK_SIZE, KVCache
from llama3.model import Transformer
from llama3.plan import free_memory
from llama3.runner import GRAPH_STEPS, PendingTokens, Runner, StepOptions
from llama3.scheduler import PrefillWork, Scheduler
from llama3.sequence import Sequence

# Groups of decode steps in flight before the host reads the oldest: one computing, one being read.
MAX_PENDING = 2
# Decode steps of one launch while prompts wait for a place that may become free any time, in place of GRAPH_STEPS: it
# idles to the end of the launch that its sequence ends in and through the next, which is under way by then.
STEPS_WHILE_OTHERS_WAIT = 4


@dataclass(frozen=True)
class Progress:
    """New tokens of one sequence."""

    sequence: Sequence
    token_ids: list[int]


class Engine:
    """Runs sequences to their end over one model.

    The cache is sized for the job at hand by `prepare` and kept for later ones that fit into it.
    """

    def __init__(self, model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.cache: KVCache | None = None
        self.state: DecodeState
        self.runner: Runner
        self.scheduler = Scheduler(0, 0)
        self._pending: deque[PendingTokens] = deque()

    def prepare(self, num_rows: int, max_len: int, max_stop_ids: int, max_num_batched_tokens: int) -> None:
        """Make sure of a cache of `num_rows` sequences of `max_len` tokens. No sequence may be running.

        max_num_batched_tokens: most prompt tokens of one prefill call.
        """
        if self.kept_cache(num_rows, max_len, max_stop_ids) is None:
            self.release()
            max_len = -(-max_len // BLOCK_SIZE) * BLOCK_SIZE
            cache = KVCache(self.model.config, num_rows, max_len, self.dtype, self.device)
            self.state = DecodeState(num_rows, max_stop_ids, self.device)
            self.runner = Runner(self.model, cache, self.state)
            self.cache = cache  # last, so that after an interruption none passes for kept
        self.scheduler = Scheduler(num_rows, max_num_batched_tokens)
        self._pending.clear()

    def kept_cache(self, num_rows: int, max_len: int, max_stop_ids: int) -> KVCache | None:
        """The present cache if `prepare` would keep it for such a job."""
        cache = self.cache
        if cache is None or cache.num_slots < num_rows or cache.max_len < max_len:
            return None
        return cache if self.state.max_stop_ids >= max_stop_ids else None

    def reclaimable_memory(self) -> int:
        """Bytes free for a cache and the work beside it, the present cache's own included."""
        held = 0 if self.cache is None else self.cache.k.nbytes + self.cache.v.nbytes
        return free_memory(self.device) + held

    def release(self) -> None:
        """Give the cache's memory back, and the captured graphs with it. What runs or waits is dropped."""
        self.cache = None
        self.scheduler = Scheduler(0, 0)
        self._pending.clear()
        if hasattr(self, "runner"):
            del self.runner, self.state

    def add(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._pending)

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """Launch the next prefill or decode steps, and report the tokens that have arrived since."""
        launched = self._prefill() or self._decode()
        if self._pending and (not launched or len(self._pending) >= MAX_PENDING or self.device.type != "cuda"):
            return self._collect(self._pending.popleft())
        return []

    def abort_all(self) -> None:
        """Drop everything that waits or runs; the engine can be used again."""
        self.state.release(range(self.state.num_rows))
        self._pending.clear()
        self.scheduler = Scheduler(self.scheduler.num_places, self.scheduler.token_budget)

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a running sequence for a reason that only the caller can see, such as a stop string."""
        sequence.finish(reason, stop_reason)
        if sequence in self.scheduler.running:
            self.state.release([sequence.row])  # one that ended by its own rules has gone idle on the device already
        self.scheduler.release(sequence)

    def _prefill(self) -> bool:
        """Launch the next prefill call. False if there is none."""
        work = self.scheduler.next_prefill()
        if work is None:
            return False
        assert self.cache is not None
        fresh = [s for s in work.placed() if s.num_prefilled == 0]
        for sequence in fresh:
            self.cache.reset(sequence.slot)
        slots = [s.slot for s in work.sequences]
        starts = self.cache.reserve(slots, work.counts)
        token_ids = array("I")  # filled from lists in a third of the time that wider or signed integers take
        for sequence, start, count in zip(work.sequences, starts, work.counts, strict=True):
            token_ids.fromlist(sequence.prompt_ids[start : start + count])
        logits = self.runner.prefill(token_ids, slots, work.counts, starts)
        if fresh:  # while the GPU computes: only drawing needs it
            self.state.assign(fresh)
        for sequence, count in zip(work.sequences, work.counts, strict=True):
            sequence.num_prefilled += count
        self._draw_first(work, logits)
        return True

    def _draw_first(self, work: PrefillWork, logits: torch.Tensor) -> None:
        """First tokens of the prompts that are complete, and of the other samples of the same prompts."""
        assert self.cache is not None
        sequences: list[Sequence] = []
        sources: list[int] = []  # their rows of logits
        for i, leader in enumerate(work.sequences):
            if leader.num_prefilled < len(leader.prompt_ids):
                continue
            for follower in work.followers[i]:
                self.cache.copy_slot(leader.slot, follower.slot)
                follower.num_prefilled = len(follower.prompt_ids)
            complete = [leader, *work.followers[i]]
            sequences += complete
            sources += [i] * len(complete)
        for sequence in sequences:
            sequence.num_scheduled = 1
        if sequences:
            if sources != list(range(logits.shape[0])):
                logits = logits[to_device(sources, torch.int64, self.device)]
            self._pending.append(self.runner.draw_first(logits, sequences))
        self._release_complete(sequences)

    def _decode(self) -> bool:
        """Launch steps for every sequence that still has tokens to draw. False if there is none."""
        assert self.cache is not None
        left_rows = self.scheduler.close_up()
        if left_rows is not None:
            self.state.close_up(left_rows)
        sequences = [s for s in self.scheduler.running if 0 < s.num_scheduled < s.max_tokens]
        if not sequences:
            return False
        options = StepOptions.of(sequences)
        one_by_one = options.num_logprobs is not None or self.device.type != "cuda"
        in_demand = self.scheduler.waiting and any(s.may_stop for s in sequences)
        at_once = STEPS_WHILE_OTHERS_WAIT if in_demand else GRAPH_STEPS
        num_steps = 1 if one_by_one else min(at_once, max(s.max_tokens - s.num_scheduled for s in sequences))
        counts = [min(num_steps, s.max_tokens - s.num_scheduled) for s in sequences]
        self.cache.reserve([s.slot for s in sequences], counts)
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.num_scheduled += count
        self._pending.append(self.runner.decode(sequences, num_steps, options))
        self._release_complete(sequences)
        return True

    def _release_complete(self, sequences: Iterable[Sequence]) -> None:
        """Free the places of those with no step left to launch: what comes there next is launched behind their last."""
        for sequence in sequences:
            if sequence.num_scheduled == sequence.max_tokens:
                self.scheduler.release(sequence)

    def _collect(self, pending: PendingTokens) -> list[Progress]:
        progress = []
        for sequence, tokens, logprobs in pending.wait():
            taken = sequence.extend(tokens)  # what was drawn after the end, before the host knew of it, is dropped
            if taken:
                sequence.logprobs.extend(logprobs)
                progress.append(Progress(sequence, taken))
            if taken and sequence.finished:
                self.scheduler.release(sequence)
        return progress
