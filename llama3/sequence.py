"""One answer being generated: a prompt, its sampling rules, and what has been generated so far."""

from dataclasses import dataclass, field

from llama3.sampling_params import SamplingParams


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a drawn token, its rank (1 is the likeliest), and the likeliest tokens with theirs."""

    logprob: float
    rank: int
    top: dict[int, float]


@dataclass(eq=False)
class Sequence:
    """One sample of one request, on token ids only.

    request, sample: which prompt of the call, and which of its n answers. rng_request: the request number that the
    noise is keyed by (0 where the request brought a seed of its own, so that its place does not matter).
    max_tokens: what max_tokens and the context leave. num_scheduled: tokens whose drawing has been launched, which
    may run ahead of output_ids. row, slot: its place while it runs. finish_reason: "stop", "length" or "abort" once
    it has ended.
    """

    request: int
    sample: int
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int]
    seed: int
    rng_request: int
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_prefilled: int = 0
    num_scheduled: int = 0
    row: int = -1
    slot: int = -1
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def may_stop(self) -> bool:
        """Whether a token or a string can end it before max_tokens do."""
        return bool(self.stop_ids or self.params.stop_strings)

    @property
    def max_context_len(self) -> int:
        """Cache positions it may need: the last token drawn is never fed back."""
        return len(self.prompt_ids) + self.max_tokens - 1

    def extend(self, token_ids: list[int]) -> list[int]:
        """Take drawn tokens up to the one that ends the answer, if there is one; returns those taken."""
        if self.finished:
            return []
        taken = token_ids[: self.max_tokens - len(self.output_ids)]
        if not self.stop_ids.isdisjoint(taken):
            min_left = self.params.min_tokens - len(self.output_ids)
            for i, token in enumerate(taken):
                if token in self.stop_ids and i >= min_left:
                    taken = taken[: i + 1]
                    # As in vLLM, stop_reason names an id that the request brought, and stays None for the model's own.
                    self.finish("stop", token if token in self.params.stop_token_ids else None)
                    break
        self.output_ids += taken
        if not self.finished and len(self.output_ids) >= self.max_tokens:
            self.finish("length")
        return taken

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason
