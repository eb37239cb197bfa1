"""An engine that generates nothing and does what its options say, to test the benchmark around it.

options: seconds: what a token takes. fail_batch, die_batch, hang_batch: at this batch size raise, end the process, or
stop answering. short: leave out this many tokens. refuse: do not load.
"""

import os
import time
from typing import Any

from benchmarks.cases import Case, Sampling
from benchmarks.engines import LoadSpec


class FakeEngine:
    full_warmup = False

    def __init__(self, spec: LoadSpec) -> None:
        self.options = spec.options
        if self.options.get("refuse"):
            raise RuntimeError("no such\nluck")
        print("a line on stdout that is no answer")
        self.details: dict[str, Any] = {"device": "cpu", "version": "1.0", "loaded": spec.name}

    def prepare(self, case: Case) -> None:
        self.details["prepared"] = str(case)

    def inputs(self, prompts: list[list[int]]) -> list[list[int]]:
        return prompts

    def generate(self, inputs: list[list[int]], output_len: int, sampling: Sampling) -> int:
        batch = len(inputs)
        if batch == self.options.get("fail_batch"):
            raise MemoryError("out of\nmemory")
        if batch == self.options.get("die_batch"):
            os._exit(7)
        if batch == self.options.get("hang_batch"):
            time.sleep(60)
        time.sleep(self.options.get("seconds", 0.0) * output_len)
        return batch * output_len - self.options.get("short", 0)

    def peak_memory_mib(self) -> tuple[int, str]:
        return 123, "made up"

    def profile(self, case: Case, sampling: Sampling, prompts: list[list[int]], trace_path: str) -> dict[str, Any]:
        return {"prompts": prompts, "trace_path": trace_path}

    def close(self) -> None:
        pass
