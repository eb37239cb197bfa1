"""A whole run: every engine in turn, every case of every suite on each, records that are written after every case.

An engine is started once for all suites. What fails is recorded as failed, and the rest still runs.
"""

import contextlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.budget import Item, TimeBudget
from benchmarks.cases import Case, Sampling
from benchmarks.engines import EngineMode, LoadSpec
from benchmarks.environment import device_memory_used, gpu_state, wait_for_memory
from benchmarks.measure import WARMUP_TOKENS, Plan, measure_case, warm_up
from benchmarks.metrics import compute_metrics, decode_bytes
from benchmarks.record import Measurement, Record
from benchmarks.target import Target
from benchmarks.worker_client import EngineFailed, WorkerClient, WorkerDied
from llama3.errors import RequestError

# Seconds set aside for starting an engine, before it is known how long it takes.
LOAD_SECONDS = {"ours": 15.0, "vllm": 60.0, "hf": 20.0}
# Seconds that a byte of decode is expected to cost, before any case was measured.
SECONDS_PER_BYTE = {"ours": 1.5 / 4.5e12, "vllm": 2.2 / 4.5e12, "hf": 40 / 4.5e12}
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
class Suite:
    """What goes into one file of results. json_path: or None."""

    record: Record
    cases: tuple[Case, ...]
    samplings: tuple[Sampling, ...]
    json_path: Path | None = None

    def save(self) -> None:
        if self.json_path is not None:
            self.record.save(self.json_path)


@dataclass(frozen=True)
class _Work:
    """One case of one suite, drawn one way."""

    suite: Suite
    case: Case
    sampling: Sampling

    def key(self, mode: EngineMode) -> Hashable:
        return mode.name, id(self.suite), self.case, self.sampling.name


@dataclass
class Session:
    """options: keyword arguments for engines, by family. timeout: seconds a command may take.

    longest: by mode or family, the most tokens that it is asked to generate; its longer cases are left out.
    succeeded: whether anything at all was measured.
    """

    target: Target
    modes: list[EngineMode]
    suites: list[Suite]
    repeats: int = 3
    seed: int = 0
    device: str = "auto"
    kernels: str = "auto"
    timeout: float = 900.0
    time_budget: float | None = None
    log_folder: Path | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    longest: Mapping[str, int] = field(default_factory=dict)
    events: Events = field(default_factory=Events)
    succeeded: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.note_memory()

    def note_memory(self) -> None:
        """Take what is in use on the GPU now for what a worker leaves when it ends."""
        self._memory_before = device_memory_used()[0] if self._on_gpu else 0

    @property
    def _on_gpu(self) -> bool:
        return self.device != "cpu"

    def run(self) -> list[Record]:
        """Measure everything; returns the records, errors included."""
        items = {
            work.key(mode): Item(mode.name, self._setup_cost(work.case), self._cost(work.case))
            for mode in self.modes
            for work in self._work(mode)
        }
        if not items:
            raise RequestError("--longest leaves out every case of every engine")
        for suite in self.suites:
            suite.record.note_asked([mode.name for mode in self.modes], suite.cases)
        rates = {mode.name: SECONDS_PER_BYTE[mode.family] for mode in self.modes}
        loads = {mode.name: LOAD_SECONDS[mode.family] for mode in self.modes}
        self._budget = TimeBudget(self.time_budget, items, rates, loads, self.repeats)
        for mode in self.modes:
            self._run_mode(mode)
            for suite in self.suites:
                suite.save()
        for suite in self.suites:
            suite.record.note_dropped(self.repeats)
            suite.save()
        return [suite.record for suite in self.suites]

    def _work(self, mode: EngineMode) -> list[_Work]:
        limit = self._limit(mode)
        return [
            _Work(suite, case, sampling)
            for suite in self.suites
            for case in suite.cases
            if limit is None or case.output_len <= limit
            for sampling in suite.samplings
        ]

    def _limit(self, mode: EngineMode) -> int | None:
        return self.longest.get(mode.name, self.longest.get(mode.family))

    def _run_mode(self, mode: EngineMode) -> None:
        """All cases on one engine. A worker that dies is started again for the next; one that cannot load is not."""
        pending = self._work(mode)
        suites = [suite for suite in self.suites if any(work.suite is suite for work in pending)]
        for suite in suites:
            suite.record.engines.setdefault(mode.name, {})
        while pending:
            self.events.loading(mode, pending[0].case)
            # WorkerDied: the case that killed the worker is recorded, the others go on in a new one.
            with self.start_worker(mode) as worker, contextlib.suppress(WorkerDied):
                try:
                    ready = worker.load(self.load_spec(mode))
                except (EngineFailed, WorkerDied) as error:
                    self._fail_all(mode, pending, f"the engine did not start: {error}")
                    return
                self._budget.loaded(mode.name)
                engine = {"label": mode.label, "start_seconds": ready["seconds"], **ready["details"]}
                for suite in suites:
                    suite.record.engines[mode.name] = engine
                self.events.loaded(mode, engine)
                while pending:
                    self._measure(worker, mode, pending.pop(0), ready["full_warmup"])
                engine["gpu_after"] = gpu_state() if self._on_gpu else {}

    def _measure(self, worker: WorkerClient, mode: EngineMode, work: _Work, full_warmup: bool) -> None:
        record, case, sampling = work.suite.record, work.case, work.sampling
        measurement = Measurement(mode.name, case, sampling.name)
        allowance = self._budget.begin(work.key(mode))
        plan = Plan(self.repeats, self.seed, full_warmup)
        try:
            self.events.preparing(mode, case, sampling)
            record.engines[mode.name] |= worker.prepare(case).get("details", {})
            warm_up(worker, case, sampling, plan)
            self.events.running(mode, case, sampling)
            timing = measure_case(worker, case, sampling, plan, allowance)
            measurement.timing = timing
            measurement.metrics = compute_metrics(self.target.config, self.target.dtype, case, timing, record.peaks)
            with contextlib.suppress(EngineFailed):
                measurement.peak_memory = worker.memory()
            if len(timing.total) < self.repeats:
                self.events.note(
                    f"time budget: {mode.name} ran {case} ({sampling.name}) {len(timing.total)} of {self.repeats} times"
                )
        except EngineFailed as error:
            measurement.error = str(error)
        except WorkerDied as error:
            measurement.error = str(error)
            raise
        finally:
            if measurement.metrics or measurement.error:  # neither: interrupted
                self._add(mode, work, measurement)
                work.suite.save()

    def start_worker(self, mode: EngineMode) -> WorkerClient:
        if self._on_gpu:
            wait_for_memory(self._memory_before + MEMORY_SLACK_MIB)
        log = self.log_folder / f"{mode.name}.log" if self.log_folder else None
        return WorkerClient(mode, timeout=self.timeout, log=log)

    def starter(self, mode: EngineMode) -> Callable[[], WorkerClient]:
        return lambda: self.start_worker(mode)

    def load_spec(self, mode: EngineMode) -> LoadSpec:
        options = {**mode.options, **self.options.get(mode.family, {})}
        cases = tuple(case for suite in self.suites for case in suite.cases)
        return self.target.load_spec(cases, self.device, self.kernels, self.seed, options)

    def _fail_all(self, mode: EngineMode, pending: list[_Work], error: str) -> None:
        self._budget.loaded(mode.name)
        for work in pending:
            self._budget.begin(work.key(mode))
            self._add(mode, work, Measurement(mode.name, work.case, work.sampling.name, error=error))

    def _add(self, mode: EngineMode, work: _Work, measurement: Measurement) -> None:
        self.succeeded |= measurement.metrics is not None
        work.suite.record.add(measurement)
        self.events.measured(mode, measurement)

    def _cost(self, case: Case) -> float:
        """How long a repetition of a case takes, in bytes of decode: the whole case and its prefill alone."""
        flops = 2 * case.batch_size * self.target.config.prefill_flops(case.input_len)
        return decode_bytes(self.target.config, self.target.dtype, case) + flops * BYTES_PER_FLOP

    def _setup_cost(self, case: Case) -> float:
        return self._cost(replace(case, output_len=min(case.output_len, WARMUP_TOKENS)))
