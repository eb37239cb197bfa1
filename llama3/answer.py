"""One answer as it grows: tokens in, text out, until a token, a string or the length ends it."""

from llama3.detokenizer import Detokenizer
from llama3.outputs import CompletionOutput, Logprob
from llama3.sequence import Sequence
from llama3.tokenizer import Tokenizer


class Answer:
    """A sequence and the text that it has become so far; without a tokenizer the text stays empty."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None) -> None:
        self.sequence, self._tokenizer = sequence, tokenizer
        self.pieces: list[str] = []
        params = sequence.params
        self._detokenizer = (
            Detokenizer(tokenizer, params.skip_special_tokens, params.stop_strings) if tokenizer else None
        )

    def take(self, token_ids: list[int]) -> str | None:
        """Turn tokens, the sequence's newest, into text. Returns the stop string if they complete one."""
        sequence, detokenizer = self.sequence, self._detokenizer
        if detokenizer is None:
            return None
        is_stop_token = sequence.finish_reason == "stop"  # the last one then: no part of the text
        before = len(sequence.output_ids) - len(token_ids)
        for i, token in enumerate(token_ids[:-1] if is_stop_token else token_ids):
            self.pieces.append(detokenizer.feed(token, may_stop=before + i >= sequence.params.min_tokens))
            if detokenizer.stopped_by is not None:
                surplus = len(token_ids) - 1 - i
                del sequence.output_ids[len(sequence.output_ids) - surplus :]
                del sequence.logprobs[len(sequence.output_ids) :]
                return detokenizer.stopped_by
        if sequence.finished:
            self.pieces.append(detokenizer.flush())
        return None

    def completion(self) -> CompletionOutput:
        """The answer in the form that callers get."""
        sequence = self.sequence
        asked = sequence.params.logprobs is not None
        return CompletionOutput(
            index=sequence.sample,
            text="".join(self.pieces),
            token_ids=sequence.output_ids,
            cumulative_logprob=sum(entry.logprob for entry in sequence.logprobs) if asked else None,
            logprobs=self._logprobs() if asked else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _logprobs(self) -> list[dict[int, Logprob]]:
        listing = []
        for token, entry in zip(self.sequence.output_ids, self.sequence.logprobs, strict=True):
            ranked = {t: Logprob(p, rank, self._piece(t)) for rank, (t, p) in enumerate(entry.top.items(), 1)}
            ranked.setdefault(token, Logprob(entry.logprob, entry.rank, self._piece(token)))
            listing.append(ranked)
        return listing

    def _piece(self, token_id: int) -> str | None:
        return self._tokenizer.decode([token_id], skip_special_tokens=False) if self._tokenizer else None
