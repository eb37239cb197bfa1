"""What a run prints while it goes on: the block of a single case, or a line a measurement of a suite."""

from typing import Any

from benchmarks import block
from benchmarks.cases import SAMPLINGS, Case, Sampling
from benchmarks.engines import EngineMode
from benchmarks.record import Measurement
from benchmarks.session import Events
from benchmarks.text_table import number


def block_events(model: str, device: str) -> Events:
    """The block of each case on each engine, phase by phase."""

    def loading(mode: EngineMode, case: Case) -> None:
        print("\n".join(block.heading(mode, model, case)))
        print(block.using_device(device))
        print(block.COMPILING)

    def preparing(mode: EngineMode, case: Case, sampling: Sampling) -> None:
        print(block.WARMING_UP)

    def running(mode: EngineMode, case: Case, sampling: Sampling) -> None:
        print(block.RUNNING)

    def measured(mode: EngineMode, measurement: Measurement) -> None:
        print("\n".join(block.result(measurement, SAMPLINGS[measurement.sampling])))

    return Events(loading, lambda mode, details: None, preparing, running, measured, note=print)


def progress_events() -> Events:
    """A line for each engine that starts, and for each measurement."""

    def loading(mode: EngineMode, case: Case) -> None:
        print(f"{mode.name}: starting")

    def loaded(mode: EngineMode, details: dict[str, Any]) -> None:
        print(f"{mode.name}: ready after {details['start_seconds']:.1f} s")

    def measured(mode: EngineMode, measurement: Measurement) -> None:
        name, metrics = f"{mode.name}: {measurement.case} {measurement.sampling}", measurement.metrics
        if metrics is None:
            print(f"{name}: failed: {measurement.error}")
            return
        floor = metrics.decode_floor_fraction
        print(
            f"{name}: {metrics.throughput:.1f} tok/s ({metrics.throughput_low:.1f} to {metrics.throughput_high:.1f}), "
            f"TTFT {metrics.ttft * 1e3:.1f} ms, TPOT {number(metrics.tpot_ms, 3)} ms"
            + ("" if floor is None else f", {floor:.1%} of the floor")
        )

    return Events(loading=loading, loaded=loaded, measured=measured, note=print)
