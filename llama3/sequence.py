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
    def max_context_len(self) -> int:
        """Cache positions it may need: the last token drawn is never fed back."""
        return len(self.prompt_ids) + self.max_tokens - 1

    def append(self, token_id: int) -> None:
        """Take one drawn token and decide whether it ends the answer."""
        self.output_ids.append(token_id)
        if token_id in self.stop_ids and len(self.output_ids) > self.params.min_tokens:
            # As in vLLM, stop_reason names an id that the request brought, and stays None for the model's own.
            self.finish("stop", token_id if token_id in self.params.stop_token_ids else None)
        elif len(self.output_ids) >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason
