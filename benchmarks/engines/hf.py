"""Hugging Face transformers under the benchmark: generate() with its dynamic cache, or compiled with a static one."""

from contextlib import nullcontext
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.cases import Case, Sampling
from benchmarks.engines import LoadSpec
from benchmarks.environment import peak_torch_memory, reset_peak_memory, synchronize
from llama3.config import SUPPORTED_DTYPES
from llama3.device import resolve_device
from llama3.errors import RequestError


class HfEngine:
    def __init__(self, spec: LoadSpec) -> None:
        transformers.logging.set_verbosity_error()
        options = dict(spec.options)
        self._static = options.pop("cache") == "static"
        self.full_warmup = self._static  # generate() compiles for the length of its cache
        self._device = resolve_device(spec.device)
        config = AutoConfig.from_pretrained(spec.folder)
        dtype = config.dtype if spec.dtype == "auto" else SUPPORTED_DTYPES[spec.dtype]
        torch.manual_seed(spec.seed)
        with self._device if self._device.type == "cuda" else nullcontext():
            if spec.random_weights:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
            else:
                model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=dtype, **options)
        self._model: Any = model.to(self._device).eval()
        self.details: dict[str, Any] = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "cache": "static, compiled" if self._static else "dynamic",
            "attention": config._attn_implementation,
            "dtype": str(dtype).removeprefix("torch."),
            "device": self._device.type,
        }

    def prepare(self, case: Case) -> None:
        # A static cache only ever grows, to save compilations; a short case after a long one would pay for its length.
        self._model.__dict__.pop("_previous_max_cache_length", None)
        reset_peak_memory(self._device)

    def inputs(self, prompts: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor(prompts, device=self._device)
        synchronize(self._device)
        return ids

    def generate(self, inputs: torch.Tensor, output_len: int, sampling: Sampling) -> int:
        greedy = sampling.temperature == 0
        drawing = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        static = {"cache_implementation": "static"} if self._static else {}
        output = self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=not greedy,
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            eos_token_id=None,
            pad_token_id=0,
            **drawing,
            **static,
        )
        answers = output[:, inputs.shape[1] :].tolist()  # on the host, as the other engines deliver them
        return sum(map(len, answers))

    def peak_memory_mib(self) -> tuple[int, str]:
        return peak_torch_memory(self._device)

    def profile(self, case: Case, sampling: Sampling, prompts: list[list[int]], trace_path: str) -> dict[str, Any]:
        raise RequestError("--profile looks into this engine only: use it with --engines ours")

    def close(self) -> None:
        del self._model
