"""Benchmark records with made-up timings, for tests of what is made from them."""

import torch

from benchmarks.cases import SUITES, Case
from benchmarks.metrics import Timing, compute_metrics
from benchmarks.peaks import Peaks
from benchmarks.record import Measurement, Record
from llama3.shapes import shape_config

PEAKS = Peaks(787e12, 4.585e12, "given")


def make_record(
    seconds: dict[str, float | None], suite: str = "seed", samplings: tuple[str, ...] = ("mission",), shape: str = "1b"
) -> Record:
    """Every case of a suite, on engines that take `seconds` by name for each token of a sequence; None has failed.

    Prefill takes ten times as long as a token, and three repetitions differ by one per cent.
    """
    record = Record(
        model=shape,
        suite=suite,
        config=shape_config(shape),
        dtype=torch.bfloat16,
        random_weights=True,
        peaks=PEAKS,
        environment={"device": "NVIDIA H200", "torch": "2.11.0", "gpu_id": "abc"},
        settings={"repeats": 3},
        created="2026-01-01T00:00:00Z",
    )
    for engine, per_token in seconds.items():
        record.engines[engine] = {"label": engine}
        for case in SUITES[suite]:
            for sampling in samplings:
                record.add(_measurement(record, engine, case, sampling, per_token))
    return record


def _measurement(record: Record, engine: str, case: Case, sampling: str, per_token: float | None) -> Measurement:
    if per_token is None:
        return Measurement(engine, case, sampling, error="RuntimeError: it broke")
    prefill = 10 * per_token
    total = prefill + per_token * (case.output_len - 1)
    timing = Timing((total, total * 1.01, total * 0.99), (prefill,) * 3)
    metrics = compute_metrics(record.config, record.dtype, case, timing, record.peaks)
    return Measurement(engine, case, sampling, timing, metrics, (2868, "made up"))
