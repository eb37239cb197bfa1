"""The streamed text equals the decoded whole, never splits a character, and ends where a plain search finds a stop."""

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import DEMO, EXAMPLES, texts
from transformers import AutoTokenizer

from llama3.detokenizer import Detokenizer
from llama3.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(Path(DEMO))


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True, stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces of every step, the flush last."""
    detokenizer = Detokenizer(tokenizer, skip, stop)
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.flush()]


@EXAMPLES
@given(text=texts, skip=st.booleans())
def test_a_streamed_text_equals_transformers_and_never_splits_a_character(
    tokenizer: Tokenizer, theirs: Any, text: str, skip: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # texts that write begin-of-text themselves
        ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids, skip)
    whole = theirs.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) == whole
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")
    assert pieces[-1] == ""  # a whole text leaves nothing behind


@EXAMPLES
@given(ids=st.lists(st.integers(0, 2100), max_size=40), skip=st.booleans())
def test_any_ids_stream_as_they_decode(tokenizer: Tokenizer, theirs: Any, ids: list[int], skip: bool) -> None:
    assert "".join(stream(tokenizer, ids, skip)) == theirs.decode(ids, skip_special_tokens=skip)


@EXAMPLES
@given(
    data=st.lists(
        st.sampled_from(
            [b"\xf0", b"\x9f\x98", b"\x80", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe2\x82", b"\xac", b"a", b"\xff"]
        )
        | st.binary(max_size=3)
    ).map(b"".join)
)
def test_bytes_that_are_not_utf8_stream_as_they_decode(tokenizer: Tokenizer, theirs: Any, data: bytes) -> None:
    id_of_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    ids = [id_of_byte[bytes([byte])] for byte in data]
    assert "".join(stream(tokenizer, ids)) == theirs.decode(ids)


def test_a_character_over_a_skipped_special_token_is_whole(tokenizer: Tokenizer) -> None:
    id_of_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    ids = [id_of_byte[b"\xe2"], id_of_byte[b"\x82"], 2041, id_of_byte[b"\xac"]]
    assert stream(tokenizer, ids) == ["", "", "", "€", ""]
    assert "".join(stream(tokenizer, ids, skip=False)) == "\ufffd<|eot_id|>\ufffd"


def search(text: str, stop: tuple[str, ...], least: int = 1) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first (the longest of those), by looking at every prefix of at
    least so many characters."""
    for end in range(least, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


stops = st.lists(st.text(alphabet="ab \n€", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@EXAMPLES
@given(text=st.text(alphabet="ab \n€", max_size=40), stop=stops, cuts=st.sets(st.integers(0, 120)))
def test_stop_strings_equal_a_plain_search(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], cuts: set[int]
) -> None:
    # Cut at any bytes, so that characters and stop strings spread over tokens in ways that BPE would not choose.
    data = text.encode()
    borders = [0, *sorted(cut for cut in cuts if 0 < cut < len(data)), len(data)]
    ids = [i for a, b in pairwise(borders) for i in ids_of(tokenizer, data[a:b])]
    expected, reason = search(text, stop)
    detokenizer = Detokenizer(tokenizer, stop=stop)
    shown, fed = "", b""
    for token_id in ids:
        shown += detokenizer.feed(token_id)
        fed += tokenizer.token_bytes(token_id)
        assert expected.startswith(shown)
        if detokenizer.stopped_by is not None:
            assert search(fed.decode(errors="ignore"), stop) == (shown, reason)
            break
        held = fed.decode(errors="ignore")[len(shown) :]
        assert held == "" or any(s.startswith(held) for s in stop)  # nothing else is held back
    shown += detokenizer.flush()
    assert (shown, detokenizer.stopped_by) == (expected, reason)


def ids_of(tokenizer: Tokenizer, data: bytes) -> list[int]:
    try:
        return tokenizer.encode(data.decode(), add_special_tokens=False)
    except UnicodeDecodeError:
        id_of_byte = {tokenizer.token_bytes(i): i for i in range(256)}
        return [id_of_byte[bytes([byte])] for byte in data]


def test_after_a_stop_string_nothing_comes(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("\n\n",))
    ids = tokenizer.encode("a\n", add_special_tokens=False) + tokenizer.encode("\nb", add_special_tokens=False)
    assert "".join(detokenizer.feed(token_id) for token_id in ids) == "a"
    assert detokenizer.stopped_by == "\n\n"
    assert (detokenizer.feed(ids[0]), detokenizer.flush()) == ("", "")


@EXAMPLES
@given(text=st.text(alphabet="ab \n€", max_size=40), stop=stops, cut=st.integers(0, 40))
def test_no_stop_string_counts_that_ends_in_the_first_tokens(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], cut: int
) -> None:
    first, rest = (tokenizer.encode(part, add_special_tokens=False) for part in (text[:cut], text[cut:]))
    detokenizer = Detokenizer(tokenizer, stop=stop)
    shown = "".join([detokenizer.feed(token_id, may_stop=False) for token_id in first])
    assert text.startswith(shown) and detokenizer.stopped_by is None
    shown += "".join([detokenizer.feed(token_id) for token_id in rest]) + detokenizer.flush()
    assert (shown, detokenizer.stopped_by) == search(text, stop, least=len(text[:cut]) + 1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(text=texts)
def test_a_stop_string_may_be_a_special_token_that_is_shown(tokenizer: Tokenizer, text: str) -> None:
    ids = [*tokenizer.encode(text, add_special_tokens=False), 2041]
    shown = "".join(stream(tokenizer, ids, skip=False, stop=("<|eot_id|>",)))
    assert shown == search(text + "<|eot_id|>", ("<|eot_id|>",))[0]
