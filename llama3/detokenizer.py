"""Text as it comes: token ids in, whole characters out, up to the first stop string."""

import codecs
from collections.abc import Sequence

from llama3.tokenizer import Tokenizer


class Detokenizer:
    """The text of one answer, token by token.

    All pieces joined equal `tokenizer.decode` of all ids, up to the first stop string. No piece ends inside a
    character: a token may hold a part of one, so bytes wait until their character is whole (a byte-level token is a
    fixed run of bytes, so nothing is ever decoded twice). Text that may be the start of a stop string waits too.

    stopped_by: the stop string that ended the text, None before. The one that is complete first counts, whichever
    tokens it came in; of two that end at the same character, the longer.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stop = tuple(stop)
        self._longest_start = max((len(text) - 1 for text in self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""  # decoded, but perhaps the start of a stop string
        self.stopped_by: str | None = None

    def feed(self, token_id: int, may_stop: bool = True) -> str:
        """The text that is certain now and was not before, often empty; nothing after a stop string.

        may_stop: whether a stop string that ends in this token's text counts.
        """
        if token_id in self._skipped:
            return ""
        return self._advance(self._decoder.decode(self._tokenizer.token_bytes(token_id)), may_stop)

    def flush(self) -> str:
        """The rest of the text, when no token follows; a character that never became whole is U+FFFD."""
        text = self._advance(self._decoder.decode(b"", final=True)) + self._pending
        self._pending = ""
        return text

    def _advance(self, text: str, may_stop: bool = True) -> str:
        if not self._stop:
            return text
        if not text or self.stopped_by is not None:
            return ""
        waited, text = len(self._pending), self._pending + text
        # One that ended before this text was none when it did.
        found = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := text.find(stop, max(0, waited - len(stop) + 1))) >= 0
        ]
        if found and may_stop:
            _, end, self.stopped_by = min(found)
            self._pending = ""
            return text[:end]
        end = self._first_possible_stop(text)
        self._pending = text[end:]
        return text[:end]

    def _first_possible_stop(self, text: str) -> int:
        """Where the earliest end of `text` begins that is the start of a stop string; `len(text)` if none is."""
        for start in range(max(0, len(text) - self._longest_start), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return start
        return len(text)
