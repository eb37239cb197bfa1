"""What collections pass over, by weak references to garbage that only a collection finds."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from llama3.collector import FROZEN_BY_PYTHON, spared_old_objects


class Node:
    def __init__(self) -> None:
        self.self = self


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def garbage() -> "weakref.ref[Node]":
    return weakref.ref(Node())


def test_old_objects_are_passed_over_and_then_come_back() -> None:
    gc.collect()
    old = garbage()
    with spared_old_objects():
        new = garbage()
        gc.collect()
        assert old() is not None and new() is None
    gc.collect()
    assert old() is None


def test_what_python_sets_aside_at_its_start_is_not_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)
    old = garbage()
    with spared_old_objects():
        gc.collect()
        assert old() is not None
    gc.collect()
    assert old() is None


def test_as_a_decorator_and_after_an_error() -> None:
    counts = []

    @spared_old_objects()
    def work() -> None:
        counts.append(gc.get_freeze_count())
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            work()
        assert gc.get_freeze_count() == 0
    assert min(counts) > 0


def test_what_the_caller_has_frozen_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by their number: of half a million objects some die meanwhile, in other threads too."""
    old = garbage()
    gc.freeze()
    assert gc.get_freeze_count() > FROZEN_BY_PYTHON
    for name in ("freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda: pytest.fail("the caller's objects are not ours"))
    new = garbage()
    with spared_old_objects(), spared_old_objects():
        gc.collect()
        assert old() is not None and new() is None
    gc.collect()
    assert old() is not None
    monkeypatch.undo()
