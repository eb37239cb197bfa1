"""Python's garbage collector, kept from long pauses while the GPU waits for its next launch."""

import contextlib
import gc
from collections.abc import Iterator

# Python may have set some hundreds aside itself (3.12 begins with 375); a caller's gc.freeze takes all there are.
FROZEN_BY_PYTHON = 1000


@contextlib.contextmanager
def spared_old_objects() -> Iterator[None]:
    """Inside, collections pass over what exists already. Also a decorator.

    In a process that has imported torch, a pass over everything takes 0.1 s, longer than the work lasts that a small
    model has been given ahead, and every hundred thousand tokens brought one about. Where the caller has frozen objects
    already (gc.freeze), all stays as it is, since giving ours back would give theirs back.
    """
    if gc.get_freeze_count() > FROZEN_BY_PYTHON:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
