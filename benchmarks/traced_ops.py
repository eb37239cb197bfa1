"""Ranges around every op, by layer: for NVTX (Nsight), and as annotations in the profiler's trace.

A wrapper around the ops that a model was built with; the model itself knows nothing of it. Inside a captured graph no
Python runs, so ranges appear where ops are launched one by one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from llama3 import LLM
from llama3.weights import ModelWeights

PREFIX = "op:"  # of annotations in a trace
# What an op is called in tables, by the field of the weights that it multiplies with.
PLACES = {"qkv": "qkv", "o": "o", "gate_up": "gate-up", "down": "down"}


class TracedOps:
    """The wrapped ops, each call inside a range such as "op:layer 3/qkv", "op:head" or "op:sample"."""

    def __init__(self, ops: Any, weights: ModelWeights) -> None:
        self._ops, self._layer = ops, 0
        self._places = {
            id(getattr(layer, field.name)): (index, PLACES[field.name])
            for index, layer in enumerate(weights.layers)
            for field in fields(layer)
            if field.name in PLACES
        }
        self._head = id(weights.lm_head)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._ops, name)
        if not callable(attribute):
            return attribute

        def traced(*args: Any, **kwargs: Any) -> Any:
            with _range(PREFIX + self._label(name, [*args, *kwargs.values()])):
                return attribute(*args, **kwargs)

        return traced

    def _label(self, name: str, arguments: list[Any]) -> str:
        for argument in arguments:
            if id(argument) in self._places:
                self._layer, place = self._places[id(argument)]
                return f"layer {self._layer}/{place}"
        if name == "rope_append_attend":  # it has no weight: it follows its layer's qkv
            return f"layer {self._layer}/attention"
        if name == "norm_linear" and any(id(argument) == self._head for argument in arguments):
            return "head"
        return "sample" if name == "sample_and_place" else name


@contextmanager
def traced_ops(llm: LLM) -> Iterator[None]:
    """While inside, the model of `llm` runs with ranges around its ops."""
    model = llm.engine.model
    plain = model.ops
    model.ops = TracedOps(plain, model.weights)
    try:
        yield
    finally:
        model.ops = plain


@contextmanager
def traced_steps(llm: LLM, name: str) -> Iterator[list[int]]:
    """While inside, every call of the engine's step runs in a range called `name`.

    Yields a list that grows by a number a call: how many tokens a sequence got by it, which is how many decode steps
    it brought.
    """
    engine = llm.engine
    plain: Callable[[], Any] = engine.step
    tokens: list[int] = []

    def step() -> Any:
        with _range(name):
            progress = plain()
        tokens.append(max((len(p.token_ids) for p in progress), default=0))
        return progress

    engine.step = step  # type: ignore[method-assign]
    try:
        yield tokens
    finally:
        del engine.step


@contextmanager
def _range(name: str) -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()
