"""Read a Chrome trace of torch.profiler: what ran on the GPU, what the host waited for, which op launched what.

All times are microseconds on the trace's clock, which host and GPU share.
"""

import gzip
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME_CATEGORIES = ("cuda_runtime", "cuda_driver")
# Calls that return only when the device has caught up; waiting for one event is what reading finished tokens takes.
BLOCKING_CALLS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaMemcpy",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
)
EVENT_WAIT = "cudaEventSynchronize"


@dataclass(frozen=True)
class Span:
    """Something with a beginning and an end. `key`: a GPU span's correlation id, a host span's thread."""

    name: str
    start: float
    end: float
    key: Any = None

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass
class Trace:
    """gpu: kernels and copies by start. annotations, calls: of the host, by start; calls are to the CUDA runtime.

    launches: correlation id -> the host call behind a GPU span.
    """

    gpu: list[Span]
    annotations: list[Span]
    calls: list[Span]
    launches: dict[int, Span]

    @classmethod
    def read(cls, path: Path) -> "Trace":
        opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)  # noqa: SIM115 - closed by `with` below
        with opened as file:
            events = json.load(file)["traceEvents"]
        return cls.from_events(events)

    @classmethod
    def from_events(cls, events: Sequence[dict[str, Any]]) -> "Trace":
        gpu, annotations, calls, launches = [], [], [], {}
        for event in events:
            if event.get("ph") != "X":
                continue
            start, category, arguments = float(event["ts"]), event.get("cat"), event.get("args", {})
            name, end = event["name"], start + float(event.get("dur", 0.0))
            if category in GPU_CATEGORIES:
                gpu.append(Span(name, start, end, arguments.get("correlation")))
            elif category == "user_annotation":
                annotations.append(Span(name, start, end, event.get("tid")))
            elif category in RUNTIME_CATEGORIES:
                calls.append(Span(name, start, end, event.get("tid")))
                if "correlation" in arguments:
                    launches[arguments["correlation"]] = calls[-1]
        for spans in (gpu, annotations, calls):
            spans.sort(key=lambda span: span.start)
        return cls(gpu, annotations, calls, launches)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.annotations if span.name == name]

    def annotation_of(self, span: Span, prefix: str) -> str | None:
        """The innermost annotation that starts with `prefix` around the launch of a GPU span, without the prefix."""
        launch = self.launches.get(span.key)
        if launch is None:
            return None
        around = [a for a in self.annotations if a.name.startswith(prefix) and a.key == launch.key]
        starts = [a.start for a in around]
        for annotation in reversed(around[: bisect_right(starts, launch.start)]):
            if annotation.end >= launch.start:
                return annotation.name.removeprefix(prefix)
            if annotation.end < launch.start - 1e6:
                break
        return None

    def window(self, start: float, end: float) -> "Trace":
        """What lies between two times: GPU spans cut to it, host calls that begin in it."""
        gpu = [
            Span(s.name, max(s.start, start), min(s.end, end), s.key)
            for s in self.gpu
            if s.end > start and s.start < end
        ]
        calls = [call for call in self.calls if start <= call.start < end]
        return Trace(gpu, [a for a in self.annotations if start <= a.start < end], calls, self.launches)

    def waits(self) -> dict[str, int]:
        """How often the host waited: blocking calls by name, and waits for an event, which leave later work running."""
        counts = Counter(call.name for call in self.calls)
        return {name: counts[name] for name in (*BLOCKING_CALLS, EVENT_WAIT) if counts[name]}


def idle_time(spans: Sequence[Span]) -> float:
    """Microseconds between the first start and the last end, of spans sorted by start, in which none is running."""
    idle, end = 0.0, spans[0].start if spans else 0.0
    for span in spans:
        idle += max(span.start - end, 0.0)
        end = max(end, span.end)
    return idle


def exposed_times(spans: Sequence[Span]) -> list[float]:
    """What each span, sorted by start, adds to the time that all of them take: its end minus the latest end before.

    A gap before a span counts for the span; where it overlaps an earlier one, only what sticks out counts. The sum is
    the time from the first start to the last end.
    """
    times, end = [], spans[0].start if spans else 0.0
    for span in spans:
        times.append(max(span.end - end, 0.0))
        end = max(end, span.end)
    return times


def label_by_template(names: Sequence[str], template: Sequence[tuple[str, str]]) -> tuple[list[str | None], list[int]]:
    """Match GPU spans with a step that repeats: a label for each name, and the indices at which steps begin.

    template: (name, label) of one step's spans in order. Names that do not continue the step get None, and so
    does what comes before the first step.
    """
    labels: list[str | None] = []
    starts: list[int] = []
    position = 0
    for index, name in enumerate(names):
        if not template or name != template[position][0]:
            labels.append(None)
            continue
        if position == 0:
            starts.append(index)
        labels.append(template[position][1])
        position = (position + 1) % len(template)
    return labels, starts
