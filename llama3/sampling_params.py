"""How one request is to be sampled and when it ends; names and defaults follow vLLM's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama3.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping rules of one request. Bad values raise RequestError.

    temperature: 0 is greedy (ties go to the lowest token id); otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 or -1 keeps all. top_p: then the fewest of those whose mass reaches it.
    min_p: then those at least this fraction as likely as the likeliest. Tokens tied with the last one kept stay.
    max_tokens: most tokens to generate; None means as many as the context has room for.
    min_tokens: no stop token is drawn before this many, and no stop string counts that ends within them.
    stop: a string that ends the answer (left out of the text), or several. stop_token_ids: more ids that end it. For
    both, None is none.
    ignore_eos: generate past the model's own stop ids. seed: makes the draws depend on it and the position alone.
    logprobs: report this many most likely tokens a position, and the drawn one: log-softmax of the raw logits.
    n: how many answers. skip_special_tokens: leave special tokens out of the text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1
    skip_special_tokens: bool = True
    stop_strings: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stop_strings = as_tuple(self.stop)
        object.__setattr__(self, "stop_strings", stop_strings)
        object.__setattr__(self, "stop_token_ids", as_tuple(self.stop_token_ids))
        for name, ok, allowed in (
            ("temperature", is_number(self.temperature) and 0 <= self.temperature < float("inf"), "a number >= 0"),
            ("top_p", is_number(self.top_p) and 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", is_at_least(self.top_k, -1), "an integer >= 1, or 0 or -1 for no limit"),
            ("min_p", is_number(self.min_p) and 0 <= self.min_p <= 1, "in [0, 1]"),
            ("max_tokens", self.max_tokens is None or is_at_least(self.max_tokens, 1), "an integer >= 1, or None"),
            (
                "min_tokens",
                is_at_least(self.min_tokens, 0) and self.min_tokens <= (self.max_tokens or self.min_tokens),
                "between 0 and max_tokens",
            ),
            ("stop", all(isinstance(s, str) and s for s in stop_strings), "a non-empty string or a list of them"),
            ("stop_token_ids", all(is_at_least(t, 0) for t in self.stop_token_ids), "a list of token ids"),
            ("seed", self.seed is None or (is_at_least(self.seed, 0) and self.seed < 2**63), "None or in [0, 2^63)"),
            ("logprobs", self.logprobs is None or is_at_least(self.logprobs, 0), "None or >= 0"),
            ("n", is_at_least(self.n, 1), "an integer >= 1"),
        ):
            if not ok:
                raise RequestError(f"SamplingParams: {name} is {getattr(self, name)!r}; it must be {allowed}")


def as_tuple(value: object) -> tuple[Any, ...]:
    """One value or many; none for None."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def is_at_least(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
