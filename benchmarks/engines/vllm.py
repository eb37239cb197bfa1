"""vLLM under the benchmark: its offline LLM.generate, with default settings but for the length and the memory share.

One start serves every case of a run, because a start on an empty cache takes minutes.
"""

import os
from pathlib import Path
from typing import Any

import vllm

from benchmarks.cases import Case, Sampling
from benchmarks.engines import LoadSpec
from benchmarks.environment import device_memory_used
from llama3.errors import RequestError

GPU_MEMORY_UTILIZATION = 0.9


class VllmEngine:
    full_warmup = False

    def __init__(self, spec: LoadSpec) -> None:
        # Text is made on both sides or on neither: this engine detokenizes where the folder has a tokenizer.
        self._detokenize = (Path(spec.folder) / "tokenizer.json").exists()
        settings: dict[str, Any] = {
            "max_model_len": spec.max_model_len,
            "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
            "skip_tokenizer_init": not self._detokenize,
            "load_format": "dummy" if spec.random_weights else "auto",
            "dtype": spec.dtype,
            "seed": spec.seed,
        } | spec.options
        self._llm = vllm.LLM(model=spec.folder, **settings)
        in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
        self.details: dict[str, Any] = {"vllm": vllm.__version__, "mode": "in-process" if in_process else "default"}
        self.details |= {"settings": settings, "device": "cuda"}

    def prepare(self, case: Case) -> None:
        """Nothing to do: vLLM's cache and graphs were made for all cases at its start."""

    def inputs(self, prompts: list[list[int]]) -> list[Any]:
        return [vllm.TokensPrompt(prompt_token_ids=ids) for ids in prompts]

    def generate(self, inputs: list[Any], output_len: int, sampling: Sampling) -> int:
        params = vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=output_len,
            ignore_eos=True,
            detokenize=self._detokenize,
        )
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def peak_memory_mib(self) -> tuple[int, str]:
        return device_memory_used()

    def profile(self, case: Case, sampling: Sampling, prompts: list[list[int]], trace_path: str) -> dict[str, Any]:
        raise RequestError("--profile looks into this engine only: use it with --engines ours")

    def close(self) -> None:
        del self._llm
