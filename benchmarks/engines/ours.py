"""This engine under the benchmark, through its public API alone."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Sampling
from benchmarks.engines import LoadSpec
from benchmarks.environment import peak_torch_memory, reset_peak_memory, synchronize
from llama3 import LLM, SamplingParams
from llama3.config import ModelConfig
from llama3.device import resolve_device, resolve_dtype
from llama3.loaded_model import LoadedModel


class OurEngine:
    """Weights are loaded once; each case gets an LLM sized for it, as a job of its own would."""

    full_warmup = False

    def __init__(self, spec: LoadSpec) -> None:
        self._spec = spec
        self._loaded = self._load(spec)
        self._llm: LLM | None = None
        device = self._loaded.weights.embed.device
        self.details: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
        self.details |= {"dtype": str(self._loaded.weights.embed.dtype).removeprefix("torch.")}
        self.details |= {"load_seconds": round(self._loaded.load_seconds, 3), "device": device.type}

    @staticmethod
    def _load(spec: LoadSpec) -> LoadedModel:
        if not spec.random_weights:
            return LoadedModel.load(spec.folder, spec.dtype, spec.device, show_progress=False)
        config = ModelConfig.from_folder(Path(spec.folder))
        config = replace(config, dtype=resolve_dtype(spec.dtype, config))
        return LoadedModel.random(spec.name, config, resolve_device(spec.device), seed=spec.seed)

    def prepare(self, case: Case) -> None:
        self.close()
        self._llm = LLM(
            self._loaded,
            kernels=self._spec.kernels,
            max_model_len=case.max_model_len,
            max_num_seqs=case.batch_size,
            seed=self._spec.seed,
            **self._spec.options,
        )
        self.details["kernels"] = self._llm.kernels
        reset_peak_memory(self._llm.device)

    @property
    def llm(self) -> LLM:
        assert self._llm is not None, "prepare comes before generate"
        return self._llm

    def inputs(self, prompts: list[list[int]]) -> list[list[int]]:
        synchronize(self.llm.device)
        return prompts

    def generate(self, inputs: list[list[int]], output_len: int, sampling: Sampling) -> int:
        outputs = self.llm.generate(inputs, sampling_params(sampling, output_len), use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def peak_memory_mib(self) -> tuple[int, str]:
        return peak_torch_memory(self.llm.device)

    def profile(self, case: Case, sampling: Sampling, prompts: list[list[int]], trace_path: str) -> dict[str, Any]:
        from benchmarks.decode_profile import profile_decode

        return profile_decode(self.llm, case, sampling, prompts, Path(trace_path))

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()
            self._llm = None


def sampling_params(sampling: Sampling, output_len: int, **extra: Any) -> SamplingParams:
    """Exactly `output_len` tokens, drawn as `sampling` says."""
    return SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=output_len, ignore_eos=True, **extra
    )
