"""A process that holds one engine and does what its parent says: see `benchmarks.protocol`.

    python -m benchmarks.worker --engine benchmarks.engines.ours:OurEngine

A process an engine, because that is the only way to get all of its memory back, and because some engines read their
settings from the environment once.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from benchmarks.engines import BenchmarkEngine, LoadSpec, engine_class
from benchmarks.protocol import case_of, fresh_prompts, sampling_of, send


class WrongTokenCount(RuntimeError):
    """The engine stopped early or ran on: its seconds would be those of another case."""


class Worker:
    """Carries out one command at a time."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._engine: BenchmarkEngine | None = None
        self._vocab_size = 0

    @property
    def engine(self) -> BenchmarkEngine:
        assert self._engine is not None, "load comes first"
        return self._engine

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        handlers = {
            "load": self._load,
            "prepare": self._prepare,
            "run": self._run,
            "memory": self._memory,
            "profile": self._profile,
        }
        return handlers[message["command"]](message)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _load(self, message: Mapping[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        spec = LoadSpec(**message["spec"])
        self._vocab_size = json.loads((Path(spec.folder) / "config.json").read_text())["vocab_size"]
        self._engine = engine_class(self._target)(spec)
        seconds = time.perf_counter() - start
        return {
            "event": "ready",
            "seconds": seconds,
            "details": self.engine.details,
            "full_warmup": self.engine.full_warmup,
        }

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        self.engine.prepare(case_of(message))
        # details again: an engine may know more of itself once it has a job.
        return {"event": "prepared", "seconds": time.perf_counter() - start, "details": self.engine.details}

    def _run(self, message: Mapping[str, Any]) -> dict[str, Any]:
        case, output_len = case_of(message), message["output_len"]
        inputs = self.engine.inputs(fresh_prompts(case, self._vocab_size, message["prompt_seed"]))
        start = time.perf_counter()
        count = self.engine.generate(inputs, output_len, sampling_of(message))
        seconds = time.perf_counter() - start
        if count != case.batch_size * output_len:
            raise WrongTokenCount(f"{count} tokens were generated, not {case.batch_size} x {output_len}")
        return {"event": "ran", "seconds": seconds}

    def _memory(self, message: Mapping[str, Any]) -> dict[str, Any]:
        mib, counts = self.engine.peak_memory_mib()
        return {"event": "memory", "mib": mib, "counts": counts}

    def _profile(self, message: Mapping[str, Any]) -> dict[str, Any]:
        case = case_of(message)
        prompts = fresh_prompts(case, self._vocab_size, message["prompt_seed"])
        tables = self.engine.profile(case, sampling_of(message), prompts, message["trace_path"])
        return {"event": "profiled", "tables": tables}


def serve(worker: Worker, requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until "quit" or the end of the stream. An error is an answer, not an end."""
    for line in requests:
        message = json.loads(line)
        if message["command"] == "quit":
            break
        try:
            send(replies, worker.answer(message))
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            trace = traceback.format_exc()
            send(replies, {"event": "error", "kind": type(error).__name__, "message": text, "traceback": trace})
    worker.close()


def private_streams() -> tuple[IO[str], IO[str]]:
    """stdin and stdout for the protocol alone: whatever else the engine prints or reads goes to stderr or nowhere."""
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    return requests, replies


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.worker", description=__doc__)
    parser.add_argument("--engine", required=True, help="module:Class")
    args = parser.parse_args(argv)
    requests, replies = private_streams()
    serve(Worker(args.engine), requests, replies)


if __name__ == "__main__":
    main(sys.argv[1:])
