"""The reading of traces: made-up ones whose answers are known, and the ranges around ops."""

import gzip
import json

import pytest
import torch

from benchmarks.cases import SAMPLINGS, Case
from benchmarks.decode_profile import gpu_times, op_times, profile_decode, steady_window
from benchmarks.op_table import op_bytes, op_tables
from benchmarks.peaks import Peaks
from benchmarks.trace import Span, Trace, exposed_times, idle_time, label_by_template
from benchmarks.traced_ops import TracedOps
from llama3.errors import RequestError
from llama3.shapes import shape_config
from llama3.weights import random_weights


def gpu(name: str, ts: float, dur: float, correlation: int = 0, cat: str = "kernel") -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


def call(name: str, ts: float, correlation: int | None = None, tid: int = 1) -> dict:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": "cuda_runtime", "name": name, "ts": ts, "dur": 1, "tid": tid, "args": args}


def annotation(name: str, ts: float, dur: float, tid: int = 1) -> dict:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": ts, "dur": dur, "tid": tid}


def test_idle_busy_and_exposed_time_with_a_gap_and_an_overlap():
    spans = [Span("a", 0, 10), Span("b", 8, 14), Span("c", 9, 12), Span("d", 20, 25)]
    assert exposed_times(spans) == [10, 4, 0, 11]
    assert idle_time(spans) == 6 and sum(exposed_times(spans)) - idle_time(spans) == 19
    assert exposed_times([]) == [] and idle_time([]) == 0


def test_a_trace_file_is_read_plain_or_compressed(tmp_path):
    events = [gpu("k", 5, 2, 1), call("cudaLaunchKernel", 1, 1), annotation("op:head", 0, 3), {"ph": "M", "name": "x"}]
    text = json.dumps({"traceEvents": events})
    (tmp_path / "t.json").write_text(text)
    with gzip.open(tmp_path / "t.json.gz", "wt") as file:
        file.write(text)
    for name in ("t.json", "t.json.gz"):
        trace = Trace.read(tmp_path / name)
        assert [span.name for span in trace.gpu] == ["k"] and trace.gpu[0].duration == 2
        assert trace.annotation_of(trace.gpu[0], "op:") == "head"


def test_a_kernel_belongs_to_the_innermost_range_of_its_launch():
    trace = Trace.from_events([
        annotation("op:layer 0/qkv", 0, 10),
        annotation("other", 1, 8),
        annotation("op:layer 0/attention", 20, 10),
        annotation("op:layer 0/qkv", 0, 100, tid=2),  # another thread: not around our launches
        call("cudaLaunchKernel", 3, 1), gpu("gemv", 50, 2, 1),
        call("cudaLaunchKernel", 22, 2), gpu("attend", 52, 2, 2),
        call("cudaLaunchKernel", 40, 3), gpu("copy", 54, 2, 3, cat="gpu_memcpy"),
        gpu("lost", 60, 1, 99),
    ])  # fmt: skip
    labels = [trace.annotation_of(span, "op:") for span in trace.gpu]
    assert labels == ["layer 0/qkv", "layer 0/attention", None, None]


def test_a_window_cuts_kernels_and_counts_the_waits_in_it():
    trace = Trace.from_events([
        gpu("a", 0, 10), gpu("b", 15, 10), gpu("c", 30, 10),
        call("cudaStreamSynchronize", 2), call("cudaStreamSynchronize", 12), call("cudaEventSynchronize", 13),
        call("cudaMemcpyAsync", 14), call("cudaGraphLaunch", 16), call("cudaDeviceSynchronize", 40),
    ])  # fmt: skip
    window = trace.window(5, 32)
    assert [(span.start, span.end) for span in window.gpu] == [(5, 10), (15, 25), (30, 32)]
    assert window.waits() == {"cudaStreamSynchronize": 1, "cudaEventSynchronize": 1}


def test_kernels_of_a_repeating_step_get_the_labels_of_the_template():
    template = [("embed", "embed"), ("gemv", "qkv"), ("attend", "attention"), ("gemv", "o")]
    names = ["gemv", "embed", "gemv", "attend", "gemv", "advance", "embed", "gemv", "attend", "gemv", "embed", "gemv"]
    labels, starts = label_by_template(names, template)
    assert labels == [None, "embed", "qkv", "attention", "o", None, "embed", "qkv", "attention", "o", "embed", "qkv"]
    assert starts == [1, 6, 10]
    assert label_by_template(["a"], []) == ([None], [])


def test_op_times_count_whole_steps_only_and_add_up_to_them():
    template = [("embed", "embed"), ("gemv", "qkv")]
    spans = [Span("gemv", 0, 5)]
    for start in (10, 20, 30):
        spans += [
            Span("embed", start, start + 1),
            Span("gemv", start + 2, start + 6),
            Span("advance", start + 6, start + 7),
        ]
    ops, steps = op_times(spans, template)
    assert steps == 2
    by_name = {row["name"]: (row["calls"], row["us"]) for row in ops}
    assert by_name == {"embed": (2, 1 + 4), "qkv": (2, 10), "between ops": (2, 2)}
    assert sum(row["us"] for row in ops) == 27 - 10
    assert op_times(spans, [("nothing", "x")]) == ([], 0)


def test_the_steady_window_leaves_out_both_ends():
    steps = [Span("engine.step", 10 * i, 10 * i + 5) for i in range(10)]
    assert steady_window(steps) == (30, 65)
    assert steady_window(steps[:3]) == (10, 25)


def test_gpu_times_of_a_steady_window():
    events = []
    for i in range(12):  # a call of Engine.step every 100 us, two decode steps in each, 10 us of them idle
        events += [annotation("engine.step", 100 * i, 90), call("cudaEventSynchronize", 100 * i + 50)]
        for step in (100 * i, 100 * i + 50):
            events += [gpu("embed", step, 5), gpu("gemv", step + 5, 40)]
    found = gpu_times(Trace.from_events(events), [("embed", "embed"), ("gemv", "qkv")])
    assert found["window_us"] == 590 and found["op_steps"] == 11
    assert found["gpu_idle_fraction"] == pytest.approx(11 * 5 / 590)
    assert found["host_waits"] == {"cudaEventSynchronize": 6}
    times = {row["name"]: row["us"] / found["op_steps"] for row in found["ops"]}
    assert times["qkv"] == pytest.approx(40) and times["embed"] == pytest.approx(5 + 5 * 10 / 11)
    assert [(row["name"], row["calls"]) for row in found["kernels"]] == [("gemv", 12), ("embed", 12)]
    unknown = gpu_times(Trace.from_events(events), [])
    assert (
        unknown["ops"] == [] and unknown["op_steps"] == 0 and unknown["gpu_idle_fraction"] == found["gpu_idle_fraction"]
    )


def test_a_profile_needs_enough_steps(tmp_path):
    with pytest.raises(RequestError, match="at least 64 tokens to generate, not 8"):
        profile_decode(None, Case(1, 1, 8), SAMPLINGS["greedy"], [[1]], tmp_path / "t.json")


def test_op_bytes_add_up_to_what_a_decode_step_reads():
    config = shape_config("1b")
    ops = ["qkv", "o", "gate-up", "down", "head"]
    weights = sum(op_bytes(config, torch.bfloat16, op, 1, 100) for op in ops)
    norms = (2 * config.num_layers + 1) * config.hidden_size * 2
    assert weights + norms == config.decode_weight_bytes(torch.bfloat16)
    assert op_bytes(config, torch.bfloat16, "attention", 3, 100) == 300 * config.kv_bytes_per_token(torch.bfloat16)
    assert op_bytes(config, torch.bfloat16, "between ops", 1, 1) is None


def test_the_op_table_sets_times_against_floors():
    head_bytes = 128256 * 2048 * 2
    us = head_bytes / 1e12 * 1e6 * 2  # twice the floor at 1 TB/s
    tables = {
        "batch_size": 1, "context_len": 192, "untraced_us_per_step": 650.0, "window_us": 7000.0, "steps": 11,
        "op_steps": 10,
        "gpu_idle_fraction": 0.0123, "host_waits": {"cudaEventSynchronize": 2},
        "ops": [{"name": "head", "calls": 10, "us": us * 10}, {"name": "between ops", "calls": 20, "us": 50.0}],
        "kernels": [{"name": "gemv<" + "x" * 100, "calls": 10, "us": us * 10}],
    }  # fmt: skip
    text = op_tables(tables, shape_config("1b"), torch.bfloat16, Peaks(None, 1e12, "given"))
    assert "GPU idle: 1.23%; host waits: cudaEventSynchronize 2" in text
    moved = 2471628800 + 192 * 32768  # weights, and K and V of the context
    share = moved / 1e12 / 650e-6
    assert f"11 steps in 7.00 ms; without tracing a step takes 650.0 us, {share:.1%} of its floor\n" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["head", "1.0", f"{us:.2f}", f"{us / 2:.2f}", "50.0%", "500"] in cells
    assert ["between ops", "2.0", "5.00", "-", "-", "-"] in cells
    assert ["step", "", f"{us + 5:.2f}", f"{us / 2:.2f}", f"{us / 2 / (us + 5):.1%}", "-"] in cells
    assert "x" * 60 in text and "x" * 80 not in text


class RecordingOps:
    name = "recording"

    def __getattr__(self, name):
        return lambda *args, **kwargs: (name, len(args))


@pytest.mark.parametrize("tied", [True, False])
def test_ranges_are_named_by_layer_and_op(tied):
    config = shape_config("tiny")
    weights = random_weights(config, "cpu")
    if not tied:
        weights.lm_head = weights.embed.clone()
    ops = TracedOps(RecordingOps(), weights)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        assert ops.embed(0, weights.embed) == ("embed", 2)
        for layer in weights.layers:
            ops.norm_linear(0, layer.attn_norm, layer.qkv, 1e-5)
            ops.rope_append_attend(0, 0, 0, 0)
            ops.linear_add_squares(0, weight=layer.o, residual=0)
            ops.norm_swiglu(0, layer.mlp_norm, layer.gate_up, 1e-5)
            ops.linear_add(0, layer.down, 0)
        ops.norm_linear(0, weights.final_norm, weights.lm_head, 1e-5)
        ops.sample(0, 0, 0)
    names = [event.name for event in profiler.events() if event.name.startswith("op:")]
    one = ["qkv", "attention", "o", "gate-up", "down"]
    layers = [f"op:layer {i}/{place}" for i in range(config.num_layers) for place in one]
    assert names == ["op:embed", *layers, "op:head", "op:sample"]
    assert ops.name == "recording"
