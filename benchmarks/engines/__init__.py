"""The engines that can be measured. Nothing of theirs is imported before one is asked for.

`EngineMode` says how a worker process is started for one; `BenchmarkEngine` is what the worker drives.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from benchmarks.cases import Case, Sampling
from llama3.errors import RequestError


@dataclass(frozen=True)
class LoadSpec:
    """What an engine is asked to load. All engines of a run get the same but for `options`.

    folder: a local Hugging Face folder. random_weights: it holds config.json alone; make up the parameters.
    max_model_len: the largest over all cases. options: keyword arguments of that engine's own.
    """

    name: str
    folder: str
    random_weights: bool
    max_model_len: int
    dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class BenchmarkEngine(Protocol):
    """One engine with a model loaded. Built as `Engine(spec)`; errors are exceptions.

    details: what to record of it: versions, device, settings. full_warmup: it compiles for the whole length of a case,
    so that a short warm-up would leave compilation to the first timed run.
    """

    details: dict[str, Any]
    full_warmup: bool

    def __init__(self, spec: LoadSpec) -> None: ...

    def prepare(self, case: Case) -> None:
        """Get ready for runs of this case."""

    def inputs(self, prompts: list[list[int]]) -> Any:
        """The prompts in the engine's own form; not timed."""

    def generate(self, inputs: Any, output_len: int, sampling: Sampling) -> int:
        """Generate exactly `output_len` tokens a prompt, end-of-text or not. Returns how many tokens came in all."""

    def peak_memory_mib(self) -> tuple[int, str]:
        """Peak memory since `prepare`, and what is counted."""

    def profile(self, case: Case, sampling: Sampling, prompts: list[list[int]], trace_path: str) -> dict[str, Any]:
        """Write a trace of decode steps and return its tables; raises RequestError where an engine has none."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class EngineMode:
    """One column of the results: which engine, in which of its modes.

    name: as in results. label: as in tables. family: modes of one family compete, and the fastest is compared.
    target: "module:Class". environment, options: what makes the mode.
    """

    name: str
    label: str
    family: str
    target: str
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


OURS = EngineMode("ours", "Custom", "ours", "benchmarks.engines.ours:OurEngine")
_HF = "benchmarks.engines.hf:HfEngine"
# Quiet logs, nothing sent home, no look-ups of a folder that lies here.
_VLLM_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def _vllm(name: str, label: str, multiprocessing: str) -> EngineMode:
    """vLLM's engine core runs in a process of its own unless told otherwise; which is faster depends on the host."""
    environment = _VLLM_ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing}
    return EngineMode(name, label, "vllm", "benchmarks.engines.vllm:VllmEngine", environment)


MODES = {
    mode.name: mode
    for mode in (
        OURS,
        _vllm("vllm-default", "vLLM", multiprocessing="1"),
        _vllm("vllm-inprocess", "vLLM in-process", multiprocessing="0"),
        EngineMode("hf-eager", "HF eager", "hf", _HF, options={"cache": "dynamic"}),
        EngineMode("hf-static", "HF compiled", "hf", _HF, options={"cache": "static"}),
    )
}
FAMILIES = {"ours": "Custom", "vllm": "vLLM", "hf": "HF"}
DEFAULT_MODES = {"ours": ("ours",), "vllm": ("vllm-default", "vllm-inprocess"), "hf": ("hf-eager",)}


def select_modes(names: Sequence[str]) -> list[EngineMode]:
    """The modes that `--engines` names: a family stands for its default modes. Each at most once, in order."""
    chosen: dict[str, EngineMode] = {}
    for name in names:
        if name not in DEFAULT_MODES and name not in MODES:
            raise RequestError(f"--engines names {name!r}; there are {', '.join((*DEFAULT_MODES, *MODES))}")
        for mode in DEFAULT_MODES.get(name, (name,)):
            chosen[mode] = MODES[mode]
    return list(chosen.values())


def engine_class(target: str) -> type[BenchmarkEngine]:
    """The class that "module:Class" names; imports the module."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
