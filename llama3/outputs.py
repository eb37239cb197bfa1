"""What `generate` returns; names follow vLLM's."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """Log-softmax of the raw logits for one token, its rank (1 is the likeliest), and its text."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass  # not frozen, nor the next: that takes three times as long, and a job ends with making all of them
class CompletionOutput:
    """One answer.

    token_ids include a stop token; text does not. logprobs: for each token, the likeliest tokens and the drawn one by
    id. finish_reason: "stop", "length", "abort" or "error". stop_reason: the stop string or the request's own stop id.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """All answers to one prompt. `prompt` is None where token ids were given; `error` says why there is no answer."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    error: str | None = None
