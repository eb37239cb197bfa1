"""Where a decode step's time goes: a trace of generation, time per op, how long the GPU idles, what the host waits for.

Two runs are traced. The first is generation as it always is, with graphs: its trace is the one that is kept, and the
times are its times. The second launches op by op, with ranges, and only tells which kernels belong to which op.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Sampling
from benchmarks.engines.ours import sampling_params
from benchmarks.environment import synchronize
from benchmarks.trace import Span, Trace, exposed_times, idle_time, label_by_template
from benchmarks.traced_ops import PREFIX, traced_ops, traced_steps
from llama3 import LLM
from llama3.errors import RequestError

STEP = "engine.step"
# Calls of Engine.step at either end of a run that are not steady decode: prefill, filling and draining the pipeline.
EDGE_STEPS = 3
EAGER_TOKENS = 8
MIN_OUTPUT_LEN = 64
UNTRACED_RUNS = 3
REST = "between ops"  # kernels outside any op: advancing positions, copying tokens


def profile_decode(
    llm: LLM, case: Case, sampling: Sampling, prompts: list[list[int]], trace_path: Path
) -> dict[str, Any]:
    """Trace `case`, write the trace to `trace_path`, and return the figures that `benchmarks.op_table` prints."""
    if case.output_len < MIN_OUTPUT_LEN:
        raise RequestError(f"--profile needs at least {MIN_OUTPUT_LEN} tokens to generate, not {case.output_len}")
    for output_len in (case.output_len, 1):  # captures graphs; the trace must not hold that
        _generate(llm, prompts, sampling, output_len)
    one_token, total = (
        statistics.median(_generate(llm, prompts, sampling, output_len) for _ in range(UNTRACED_RUNS))
        for output_len in (1, case.output_len)
    )
    result: dict[str, Any] = {
        "batch_size": case.batch_size,
        "input_len": case.input_len,
        "output_len": case.output_len,
        "context_len": case.input_len + case.output_len // 2,
        "untraced_us_per_step": (total - one_token) / (case.output_len - 1) * 1e6,
    }
    on_gpu = llm.device.type == "cuda"
    with traced_steps(llm, STEP) as tokens, nullcontext() if on_gpu else traced_ops(llm):
        trace = _trace(llm, prompts, sampling, case.output_len, trace_path)
    result["steps"] = sum(_inner(tokens))
    if not on_gpu:
        return result | host_times(trace)
    return result | gpu_times(trace, _template(llm, sampling, prompts))


def _generate(llm: LLM, prompts: list[list[int]], sampling: Sampling, output_len: int, **extra: Any) -> float:
    synchronize(llm.device)
    start = time.perf_counter()
    llm.generate(prompts, sampling_params(sampling, output_len, **extra), use_tqdm=False)
    return time.perf_counter() - start


def _trace(llm: LLM, prompts: list[list[int]], sampling: Sampling, output_len: int, path: Path, **extra: Any) -> Trace:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if llm.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        _generate(llm, prompts, sampling, output_len, **extra)
        synchronize(llm.device)
    profiler.export_chrome_trace(str(path))
    return Trace.read(path)


def _template(llm: LLM, sampling: Sampling, prompts: list[list[int]]) -> list[tuple[str, str]]:
    """(kernel, op) of one decode step in order, from a run that launches op by op."""
    with tempfile.TemporaryDirectory() as folder, traced_ops(llm), traced_steps(llm, STEP):
        # Asking for log-probabilities is what makes the engine launch a step at a time, without a graph.
        trace = _trace(llm, prompts, sampling, EAGER_TOKENS, Path(folder, "eager.json"), logprobs=0)
    steps = trace.named(STEP)
    step = steps[len(steps) // 2]
    template = []
    for span in trace.gpu:
        launch = trace.launches.get(span.key)
        if launch is not None and step.start <= launch.start < step.end:
            label = trace.annotation_of(span, PREFIX)
            if label is not None:
                template.append((span.name, label.split("/")[-1]))
    return template


def steady_window(steps: Sequence[Span]) -> tuple[float, float]:
    """From when to when decode runs undisturbed, given the spans of all calls of Engine.step."""
    inner = _inner(steps)
    return inner[0].start, inner[-1].end


def _inner(calls: Sequence[Any]) -> Sequence[Any]:
    return calls[EDGE_STEPS:-EDGE_STEPS] or calls[1:] or calls


def gpu_times(trace: Trace, template: list[tuple[str, str]]) -> dict[str, Any]:
    """Idle time, host waits, and time per op and per kernel in the steady part of a trace."""
    start, end = steady_window(trace.named(STEP))
    window = trace.window(start, end)
    per_kernel: dict[str, list[float]] = defaultdict(list)
    for span in window.gpu:
        per_kernel[span.name].append(span.duration)
    ops, num_steps = op_times(window.gpu, template)
    edges = (end - start) - sum(exposed_times(window.gpu))  # before the first kernel and after the last
    return {
        "window_us": end - start,
        "op_steps": num_steps,
        "gpu_idle_fraction": (idle_time(window.gpu) + edges) / (end - start),
        "host_waits": window.waits(),
        "ops": ops,
        "kernels": _totals(per_kernel),
    }


def op_times(spans: Sequence[Span], template: list[tuple[str, str]]) -> tuple[list[dict[str, Any]], int]:
    """Time of each op over the whole steps among the spans, and how many; none if the template does not fit."""
    labels, starts = label_by_template([span.name for span in spans], template)
    if len(starts) < 2:
        return [], 0
    whole = slice(starts[0], starts[-1])
    per_op: dict[str, list[float]] = defaultdict(list)
    for label, alone in zip(labels[whole], exposed_times(spans[whole]), strict=True):
        per_op[label or REST].append(alone)
    return _totals(per_op), len(starts) - 1


def host_times(trace: Trace) -> dict[str, Any]:
    """On a CPU an op's range is its time."""
    start, end = steady_window(trace.named(STEP))
    window = trace.window(start, end)
    per_op: dict[str, list[float]] = defaultdict(list)
    for span in window.annotations:
        if span.name.startswith(PREFIX):
            per_op[span.name.removeprefix(PREFIX).split("/")[-1]].append(span.duration)
    return {
        "window_us": end - start,
        "op_steps": len(window.named(STEP)),
        "gpu_idle_fraction": None,
        "host_waits": {},
        "ops": _totals(per_op),
        "kernels": [],
    }


def _totals(groups: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Count and total microseconds of each group, the longest first."""
    rows = [{"name": name, "calls": len(times), "us": sum(times)} for name, times in groups.items()]
    return sorted(rows, key=lambda row: -row["us"])
