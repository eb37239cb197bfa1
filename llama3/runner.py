"""Launches forward passes and draws tokens; results come back as copies under way, so the host never waits here."""

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from llama3.decode_state import IDLE, DecodeState
from llama3.device import to_device
from llama3.forward_batch import DecodeBatch, PrefillBatch
from llama3.kv_cache import KVCache
from llama3.model import Transformer
from llama3.prefill_graphs import PrefillGraphs
from llama3.sequence import Sequence, TokenLogprobs

GRAPH_STEPS = 8

Logprobs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class StepOptions:
    """What the host knows of the rows in a step; a captured graph belongs to one value of it.

    num_logprobs: None, or how many of the likeliest tokens to report.
    """

    all_greedy: bool
    any_filter: bool
    any_top_k_and_top_p: bool
    any_min_tokens: bool
    num_logprobs: int | None

    @classmethod
    def of(cls, sequences: Items[Sequence]) -> "StepOptions":
        params = [s.params for s in sequences]
        asked = [p.logprobs for p in params if p.logprobs is not None]
        return cls(
            all_greedy=all(p.temperature == 0 for p in params),
            any_filter=any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params),
            any_top_k_and_top_p=any(p.temperature > 0 and p.top_k > 0 and p.top_p < 1 for p in params),
            any_min_tokens=any(p.min_tokens > 0 for p in params),
            num_logprobs=max(asked, default=None),
        )


@dataclass(frozen=True)
class Draw:
    """Device results of one step: token_ids [B], and if asked for log-probabilities [B], ranks [B], top-k [B, k]."""

    token_ids: torch.Tensor
    logprobs: Logprobs | None


class PendingTokens:
    """Tokens on their way to the host: num_steps draws for each of some sequences."""

    def __init__(self, sequences: Items[Sequence], columns: Items[int], token_ids: torch.Tensor, draw: Draw | None):
        """token_ids [num_steps, B], on the host or on their way there; `columns`: which belongs to which sequence."""
        self.sequences, self.columns = list(sequences), list(columns)
        self._tensors = [token_ids]
        if draw is not None and draw.logprobs is not None:
            self._tensors += [_copy_to_host(t) for t in draw.logprobs]
        self._copied = torch.cuda.Event() if token_ids.is_pinned() else None
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> list[tuple[Sequence, list[int], list[TokenLogprobs]]]:
        """Block until the copy is done: each sequence's tokens in order, with log-probabilities where asked for."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[list[int]] = self._tensors[0].t().tolist()
        return [
            (sequence, tokens[column], self._logprobs(sequence, column))
            for sequence, column in zip(self.sequences, self.columns, strict=True)
        ]

    def _logprobs(self, sequence: Sequence, column: int) -> list[TokenLogprobs]:
        if sequence.params.logprobs is None:
            return []
        logprob, rank, top, top_ids = (t[column] for t in self._tensors[1:])
        k = sequence.params.logprobs
        pairs = dict(zip(top_ids[:k].tolist(), top[:k].tolist(), strict=True))
        return [TokenLogprobs(float(logprob), int(rank), pairs)]


class Runner:
    """Runs a model over one cache and one decode state."""

    def __init__(self, model: Transformer, cache: KVCache, state: DecodeState) -> None:
        self.model, self.cache, self.state = model, cache, state
        self._whole_step = model.ops.whole_step(model.config, model.weights, model.rope, cache, state)
        self._graphs: dict[tuple[int, int, StepOptions], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._graph_pool = torch.cuda.graph_pool_handle() if state.device.type == "cuda" else None
        self._prefills = PrefillGraphs(model, cache, self._graph_pool) if model.ops.can_capture_prefill else None

    def prefill(
        self, token_ids: "array[int]", seq_slots: Items[int], seq_lens: Items[int], past_lens: Items[int]
    ) -> torch.Tensor:
        """Packed prompts, token_ids [T] of type "I", behind what their slots hold -> logits [B, V], each one's last.

        The logits are valid until the next call.
        """
        if self._prefills is not None and self._prefills.takes(seq_lens, past_lens):
            return self._prefills.run(token_ids, seq_slots, seq_lens)
        ids = to_device(torch.frombuffer(token_ids, dtype=torch.int32), torch.int64, self.state.device)
        batch = PrefillBatch.build(seq_slots, seq_lens, past_lens, self.state.device)
        return self.model.prefill(ids, batch, self.cache)

    def draw_first(self, logits: torch.Tensor, sequences: Items[Sequence]) -> PendingTokens:
        """Draw the first token of sequences whose prompts are complete; logits [B, V], one row each."""
        device = self.state.device
        index = to_device([s.row for s in sequences], torch.int64, device)
        positions = to_device([len(s.prompt_ids) for s in sequences], torch.int32, device)
        options = StepOptions.of(sequences)
        sampling = self.state.with_flags(options.all_greedy, options.any_filter).rows(index)
        raw = logits.float().clone() if options.num_logprobs is not None else None
        if options.any_min_tokens:
            self.state.forbid_early_stops(logits, index, positions)
        token_ids = self.model.ops.sample(logits, sampling, positions)
        self.state.place(index, token_ids, positions)
        draw = Draw(token_ids, log_probabilities(raw, token_ids, options.num_logprobs))
        return PendingTokens(sequences, range(len(sequences)), _copy_to_host(token_ids[None]), draw)

    def decode(self, sequences: Items[Sequence], num_steps: int, options: StepOptions) -> PendingTokens:
        """Launch `num_steps` decode steps over the rows up to the last one of `sequences`, whose options these are."""
        num_rows = max(s.row for s in sequences) + 1
        draw = None
        if options.num_logprobs is not None or self.state.device.type != "cuda":
            assert num_steps == 1, "log-probabilities come back one step at a time"
            draw = self._step(num_rows, options)
            tokens = _copy_to_host(draw.token_ids[None])
        else:
            tokens = self._replay(num_rows, num_steps, options)
        return PendingTokens(sequences, [s.row for s in sequences], tokens, draw)

    def _step(self, num_rows: int, options: StepOptions, out: torch.Tensor | None = None) -> Draw:
        """One decode step, op by op or in one launch. out: int64 [num_rows], receives the tokens if given."""
        state, rows = self.state, slice(0, num_rows)
        if self._whole_step is not None and num_rows == 1:
            self._whole_step.launch()
            logits = self._whole_step.logits
        else:
            batch = DecodeBatch(state.slots[rows], state.positions[rows], self._context_bound(num_rows))
            logits = self.model.decode_step(state.token_ids[rows], batch, self.cache)
        raw = logits.float().clone() if options.num_logprobs is not None else None
        sampling = state.with_flags(options.all_greedy, options.any_filter).rows(rows)
        token_ids = self.model.ops.sample_and_place(logits, sampling, state, options.any_min_tokens, out)
        return Draw(token_ids, log_probabilities(raw, token_ids, options.num_logprobs))

    def _context_bound(self, num_rows: int) -> int:
        # A captured step must hold for every length to come.
        if self.state.device.type == "cuda":
            return self.cache.max_len
        return max(int(self.state.positions[:num_rows].max()) + 1, 1)

    def _replay(self, num_rows: int, num_steps: int, options: StepOptions) -> torch.Tensor:
        """Token ids [num_steps, num_rows] on their way to the host, from one launch or from captured graphs."""
        # Steps follow one another within one launch where it can draw; else the sampling kernel is between them.
        chains = not options.any_top_k_and_top_p and not options.any_min_tokens
        if self._whole_step is not None and num_rows == 1 and chains:
            tokens = torch.empty(num_steps, 1, dtype=torch.int64, device=self.state.device)
            self._whole_step.launch(tokens)
            return _copy_to_host(tokens)
        host = torch.empty(num_steps, num_rows, dtype=torch.int64, pin_memory=True)
        done = 0
        while done < num_steps:
            steps = GRAPH_STEPS if num_steps - done >= GRAPH_STEPS else 1
            graph, drawn = self._graph(num_rows, steps, options)
            graph.replay()
            host[done : done + steps].copy_(drawn, non_blocking=True)  # enqueued before the graph can run again
            done += steps
        return host

    def _graph(self, num_rows: int, num_steps: int, options: StepOptions) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph of `num_steps` steps, and int64 [num_steps, num_rows], which each replay fills with its tokens."""
        key = (num_rows, num_steps, options)
        if key not in self._graphs:
            state = self.state
            kept = state.token_ids.clone(), state.positions.clone()
            state.positions.fill_(IDLE)  # the warm-up steps must leave no trace in the cache
            drawn = torch.empty(num_steps, num_rows, dtype=torch.int64, device=state.device)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(num_rows, options, drawn[0])
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._graph_pool):
                for out in drawn.unbind():
                    self._step(num_rows, options, out)
            state.token_ids.copy_(kept[0])
            state.positions.copy_(kept[1])
            self._graphs[key] = graph, drawn
        return self._graphs[key]


def log_probabilities(logits: torch.Tensor | None, token_ids: torch.Tensor, k: int | None) -> Logprobs | None:
    """Log-softmax of fp32 logits [B, V]: of token_ids [B], their ranks [B] from 1, the top k's and ids [B, k].

    None if they were not asked for.
    """
    if logits is None or k is None:
        return None
    logprobs = logits.log_softmax(-1)
    drawn = logprobs.gather(1, token_ids[:, None])
    top = logprobs.topk(k, dim=-1)
    return drawn[:, 0], (logprobs > drawn).sum(-1) + 1, top.values, top.indices


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
