"""A whole run: every engine in turn, every case on each, one record that is written after every case.

What fails is recorded as failed, and the rest still runs.
"""

import contextlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.budget import TimeBudget
from benchmarks.cases import Case, Sampling
from benchmarks.engines import EngineMode, LoadSpec
from benchmarks.environment import device_memory_used, gpu_state, wait_for_memory
from benchmarks.measure import Plan, measure_case, warm_up
from benchmarks.metrics import compute_metrics, decode_bytes
from benchmarks.record import Measurement, Record
from benchmarks.target import Target
from benchmarks.worker_client import EngineFailed, WorkerClient, WorkerDied

# Seconds set aside for starting an engine, before it is known how long it takes.
LOAD_SECONDS = {"ours": 15.0, "vllm": 60.0, "hf": 20.0}
MEMORY_SLACK_MIB = 1024
# A FLOP counts like this many bytes when costs are compared: the ratio of the peaks of a data-centre GPU.
BYTES_PER_FLOP = 1 / 170


@dataclass
class Events:
    """What a run tells while it goes on; every field may be replaced."""

    loading: Callable[[EngineMode, Case], None] = lambda mode, case: None
    loaded: Callable[[EngineMode, dict[str, Any]], None] = lambda mode, details: None
    preparing: Callable[[EngineMode, Case, Sampling], None] = lambda mode, case, sampling: None
    running: Callable[[EngineMode, Case, Sampling], None] = lambda mode, case, sampling: None
    measured: Callable[[EngineMode, Measurement], None] = lambda mode, measurement: None
    note: Callable[[str], None] = lambda text: None


@dataclass
class Session:
    """options: keyword arguments for engines, by family. timeout: seconds a command may take. json_path: or None."""

    target: Target
    modes: list[EngineMode]
    cases: tuple[Case, ...]
    samplings: tuple[Sampling, ...]
    record: Record
    repeats: int = 3
    seed: int = 0
    device: str = "auto"
    kernels: str = "auto"
    timeout: float = 900.0
    time_budget: float | None = None
    json_path: Path | None = None
    log_folder: Path | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: Events = field(default_factory=Events)

    def __post_init__(self) -> None:
        self.note_memory()

    def note_memory(self) -> None:
        """Take what is in use on the GPU now for what a worker leaves when it ends."""
        self._memory_before = device_memory_used()[0]

    def run(self) -> Record:
        """Measure everything; returns the record, errors included."""
        costs: dict[Hashable, float] = {
            (mode.name, case, sampling.name): self._cost(case)
            for mode in self.modes
            for case in self.cases
            for sampling in self.samplings
        }
        self._budget = TimeBudget(self.time_budget, costs, {m.name: LOAD_SECONDS[m.family] for m in self.modes})
        for mode in self.modes:
            self._run_mode(mode)
            self._save()
        return self.record

    def _run_mode(self, mode: EngineMode) -> None:
        """All cases on one engine. A worker that dies is started again for the next; one that cannot load is not."""
        self.record.engines.setdefault(mode.name, {})
        pending = [(case, sampling) for case in self.cases for sampling in self.samplings]
        while pending:
            self.events.loading(mode, pending[0][0])
            # WorkerDied: the case that killed the worker is recorded, the others go on in a new one.
            with self.start_worker(mode) as worker, contextlib.suppress(WorkerDied):
                try:
                    ready = worker.load(self.load_spec(mode))
                except (EngineFailed, WorkerDied) as error:
                    self._fail_all(mode, pending, f"the engine did not start: {error}")
                    return
                self._budget.loaded(mode.name)
                engine = {"label": mode.label, "start_seconds": ready["seconds"], **ready["details"]}
                self.record.engines[mode.name] = engine
                self.events.loaded(mode, engine)
                while pending:
                    self._measure(worker, mode, *pending.pop(0), ready["full_warmup"])
                engine["gpu_after"] = gpu_state()

    def _measure(
        self, worker: WorkerClient, mode: EngineMode, case: Case, sampling: Sampling, full_warmup: bool
    ) -> None:
        measurement = Measurement(mode.name, case, sampling.name)
        allowance = self._budget.item((mode.name, case, sampling.name))
        plan = Plan(self.repeats, self.seed, full_warmup)
        try:
            self.events.preparing(mode, case, sampling)
            self.record.engines[mode.name] |= worker.prepare(case).get("details", {})
            warm_up(worker, case, sampling, plan)
            self.events.running(mode, case, sampling)
            timing = measure_case(worker, case, sampling, plan, allowance)
            measurement.timing = timing
            measurement.metrics = compute_metrics(
                self.target.config, self.target.dtype, case, timing, self.record.peaks
            )
            with contextlib.suppress(EngineFailed):
                measurement.peak_memory = worker.memory()
            if len(timing.total) < self.repeats:
                self._note(
                    f"time budget: {mode.name} ran {case} ({sampling.name}) {len(timing.total)} of {self.repeats} times"
                )
        except EngineFailed as error:
            measurement.error = str(error)
        except WorkerDied as error:
            measurement.error = str(error)
            raise
        finally:
            self.record.add(measurement)
            self.events.measured(mode, measurement)
            self._save()

    def start_worker(self, mode: EngineMode) -> WorkerClient:
        wait_for_memory(self._memory_before + MEMORY_SLACK_MIB)
        log = self.log_folder / f"{mode.name}.log" if self.log_folder else None
        return WorkerClient(mode, timeout=self.timeout, log=log)

    def starter(self, mode: EngineMode) -> Callable[[], WorkerClient]:
        return lambda: self.start_worker(mode)

    def load_spec(self, mode: EngineMode) -> LoadSpec:
        options = {**mode.options, **self.options.get(mode.family, {})}
        return self.target.load_spec(self.cases, self.device, self.kernels, self.seed, options)

    def _fail_all(self, mode: EngineMode, pending: list[tuple[Case, Sampling]], error: str) -> None:
        self._budget.loaded(mode.name)
        for case, sampling in pending:
            self._budget.item((mode.name, case, sampling.name))
            measurement = Measurement(mode.name, case, sampling.name, error=error)
            self.record.add(measurement)
            self.events.measured(mode, measurement)

    def _cost(self, case: Case) -> float:
        """How long a case takes, in any unit: bytes that decode reads, FLOPs that prefill computes."""
        flops = case.batch_size * self.target.config.prefill_flops(case.input_len)
        return decode_bytes(self.target.config, self.target.dtype, case) + flops * BYTES_PER_FLOP

    def _note(self, text: str) -> None:
        self.record.notes.append(text)
        self.events.note(text)

    def _save(self) -> None:
        if self.json_path is not None:
            self.record.save(self.json_path)
