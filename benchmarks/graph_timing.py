"""Times on a GPU by replays of CUDA graphs: the host is not in them, the gap that a node of a graph costs is."""

import statistics
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph of all calls. The first two run before, so that nothing is built or searched for in the capture."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Time of one replay, between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def replays_microseconds(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    """Times of that many replays, after one that does not count."""
    graph.replay()
    return [replay_seconds(graph) * 1e6 for _ in range(repeats)]


def microseconds(calls: Sequence[Call], repeats: int) -> list[float]:
    """Time of one call, a value a replay of all of them; the first replay does not count."""
    return [time / len(calls) for time in replays_microseconds(capture(calls), repeats)]


def median_microseconds(calls: Sequence[Call], repeats: int) -> float:
    return statistics.median(microseconds(calls, repeats))
