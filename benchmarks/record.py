"""What a run leaves behind: one JSON file, whole after every case, from which all tables and plots are made."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.engines import FAMILIES, MODES
from benchmarks.metrics import Metrics, Timing
from benchmarks.peaks import Peaks
from llama3.config import SUPPORTED_DTYPES, ModelConfig, RopeScaling
from llama3.errors import ConfigError

FORMAT = 1
DROPPED = "repetitions of long cases were dropped, and the figures say which"


@dataclass
class Measurement:
    """One case on one engine, or the error that it ended with. peak_memory: MiB and what is counted."""

    engine: str
    case: Case
    sampling: str
    timing: Timing | None = None
    metrics: Metrics | None = None
    peak_memory: tuple[int, str] | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, Case, str]:
        return self.engine, self.case, self.sampling


@dataclass
class Record:
    """model: as in tables. settings: the flags that change figures. engines: by name, what each says of itself.

    startup: by engine name, seconds from process start to first token. notes: what a reader must know. asked: names of
    "engines" and "cases" that runs were to measure.
    """

    model: str
    suite: str
    config: ModelConfig
    dtype: torch.dtype
    random_weights: bool
    peaks: Peaks
    environment: dict[str, Any]
    settings: dict[str, Any]
    created: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    startup: dict[str, dict[str, Any]] = field(default_factory=dict)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    asked: dict[str, list[str]] = field(default_factory=dict)

    def add(self, measurement: Measurement) -> None:
        """Append, or take the place of an earlier one of the same engine, case and sampling. A failure takes no
        figures' place."""
        keys = [m.key for m in self.measurements]
        if measurement.key not in keys:
            self.measurements.append(measurement)
            return
        index = keys.index(measurement.key)
        if measurement.metrics or not self.measurements[index].metrics:
            self.measurements[index] = measurement

    def add_profile(self, profile: dict[str, Any]) -> None:
        """Append, or take the place of an earlier one of the same engine, sampling and case."""
        keys = ("engine", "sampling", "batch_size", "input_len", "output_len")
        self.profiles = [p for p in self.profiles if any(p.get(key) != profile[key] for key in keys)] + [profile]

    def add_startup(self, engine: str, found: dict[str, Any]) -> None:
        """As `add`, with what `benchmarks.startup` found."""
        if "error" not in found or "error" in self.startup.get(engine, found):
            self.startup[engine] = found

    def note_asked(self, engines: Iterable[str], cases: Iterable[Case]) -> None:
        """What a run is to measure, beside what earlier ones were: `gaps` says what of it was not."""
        for key, values in (("engines", engines), ("cases", map(str, cases))):
            self.asked[key] = list(dict.fromkeys([*self.asked.get(key, []), *values]))

    def note_dropped(self, repeats: int) -> None:
        """Note which engines ran a case less often than asked; of an earlier run's word on it nothing need hold now."""
        names = {m.engine: None for m in self.measurements if m.timing and len(m.timing.total) < repeats}
        self.notes = [note for note in self.notes if not note.endswith(DROPPED)]
        if names:
            self.notes.append(f"time budget ({', '.join(names)}): {DROPPED}")

    def gaps(self) -> list[str]:
        """What was left out, of all that was asked for or measured of any engine: a line for each that lacks some."""
        measured, lines = {(m.engine, str(m.case), m.sampling) for m in self.measurements}, []
        cases = dict.fromkeys([*map(str, self.cases()), *self.asked.get("cases", [])])
        for name in dict.fromkeys([*self.engines, *self.asked.get("engines", [])]):
            missing = []
            for case in cases:
                without = [sampling for sampling in self.samplings() if (name, case, sampling) not in measured]
                if without:
                    missing.append(case if without == self.samplings() else f"{case} {', '.join(without)}")
            if missing:
                lines.append(f"{MODES[name].label} was not measured at {'; '.join(missing)}")
        return lines

    def find(self, engine: str, case: Case, sampling: str) -> Measurement | None:
        return next((m for m in self.measurements if m.key == (engine, case, sampling)), None)

    def best(self, family: str, case: Case, sampling: str) -> Measurement | None:
        """The fastest mode of a family on a case; None if none succeeded."""
        found = [
            m
            for m in self.measurements
            if (m.case, m.sampling) == (case, sampling) and MODES[m.engine].family == family and m.metrics
        ]
        return max(found, key=_throughput, default=None)

    def families(self) -> list[str]:
        """Families that were asked for, in the order of FAMILIES."""
        present = {MODES[name].family for name in [*self.engines, *(m.engine for m in self.measurements)]}
        return [family for family in FAMILIES if family in present]

    def cases(self) -> list[Case]:
        """Cases in the order measured, each once."""
        return list(dict.fromkeys(m.case for m in self.measurements))

    @property
    def subject(self) -> str:
        """What was measured where, for titles: "1b on H200"."""
        words = [word for word in str(self.environment.get("device", "")).split() if word not in ("NVIDIA", "GeForce")]
        numbers = [i for i, word in enumerate(words) if any(letter.isdigit() for letter in word)]
        words = words[: numbers[0] + 1 if numbers else 1]  # "H100 80GB HBM3", "RTX 4090"
        return f"{self.model} on {' '.join(words)}" if words else self.model

    def samplings(self) -> list[str]:
        return list(dict.fromkeys(m.sampling for m in self.measurements))

    def save(self, path: Path) -> None:
        """Write whole or not at all, so that a run that is stopped leaves the last complete file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        os.replace(partial, path)

    def to_json(self) -> dict[str, Any]:
        values = {"format": FORMAT} | {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["config"] = asdict(self.config) | {"dtype": _name(self.config.dtype)}
        values["config"]["eos_token_ids"] = sorted(self.config.eos_token_ids)
        values["dtype"] = _name(self.dtype)
        values["peaks"] = self.peaks.to_json()
        values["measurements"] = [asdict(m) for m in self.measurements]
        return values

    @classmethod
    def load(cls, path: Path) -> "Record":
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: no benchmark results can be read from it ({error})") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ConfigError(f"{path}: not benchmark results of format {FORMAT}; choose another file")
        try:
            values["config"] = _config(values["config"])
            values["dtype"] = SUPPORTED_DTYPES[values["dtype"]]
            values["peaks"] = Peaks(**values["peaks"])
            values["measurements"] = [_measurement(m) for m in values["measurements"]]
            record = cls(**values)
            named = [*record.engines, *record.startup, *record.asked.get("engines", [])]
            unknown = {*named, *(m.engine for m in record.measurements)} - set(MODES)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: benchmark results that are not whole ({error!r})") from error
        if unknown:
            raise ConfigError(f"{path}: results of engines that are not known here: {', '.join(sorted(unknown))}")
        return record


def _throughput(measurement: Measurement) -> float:
    return measurement.metrics.throughput if measurement.metrics else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config(values: dict[str, Any]) -> ModelConfig:
    scaling = values["rope_scaling"]
    changes = {
        "rope_scaling": None if scaling is None else RopeScaling(**scaling),
        "dtype": SUPPORTED_DTYPES[values["dtype"]],
        "eos_token_ids": frozenset(values["eos_token_ids"]),
    }
    return ModelConfig(**(values | changes))


def _measurement(values: dict[str, Any]) -> Measurement:
    timing, metrics, memory = values["timing"], values["metrics"], values["peak_memory"]
    changes = {
        "case": Case(**values["case"]),
        "timing": None if timing is None else Timing(tuple(timing["total"]), tuple(timing["one_token"])),
        "metrics": None if metrics is None else Metrics(**metrics),
        "peak_memory": None if memory is None else (memory[0], memory[1]),
    }
    return Measurement(**(values | changes))
