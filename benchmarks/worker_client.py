"""The parent's side of a worker: start it, talk to it, and give up on it when it dies or hangs."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.cases import Case, Sampling
from benchmarks.engines import EngineMode, LoadSpec
from benchmarks.protocol import send

ROOT = Path(__file__).resolve().parent.parent
LOG_TAIL_LINES = 12
QUIT_SECONDS = 30.0


def with_repository_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with this repository importable whatever the working directory is."""
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


class EngineFailed(RuntimeError):
    """A command failed inside the engine; the worker lives and can be asked again."""


class WorkerDied(RuntimeError):
    """The worker ended, or gave no answer in time; the message ends with the last lines of its log."""


class WorkerClient:
    """One worker process. Use it as a context manager: its end takes the process, and its children, along."""

    def __init__(self, mode: EngineMode, *, timeout: float, log: Path | None = None) -> None:
        """`timeout`: seconds that a command may take. `log`: where the worker's own output goes (else a temp file)."""
        self.mode, self._timeout = mode, timeout
        self.started_at = time.perf_counter()
        self._log: IO[str] = open(log, "a+") if log else tempfile.TemporaryFile("a+")  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.worker", "--engine", mode.target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**with_repository_path(os.environ), **mode.environment},
            start_new_session=True,  # its own process group: engines start children of their own
        )
        self._replies: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "WorkerClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C does not wait for the engine
            self._kill_group()
        self.close()

    def load(self, spec: LoadSpec) -> dict[str, Any]:
        return self._ask({"command": "load", "spec": spec.to_json()}, "ready")

    def prepare(self, case: Case) -> dict[str, Any]:
        return self._ask({"command": "prepare", "case": asdict(case)}, "prepared")

    def run(self, case: Case, output_len: int, sampling: Sampling, prompt_seed: str) -> float:
        """Wall-clock seconds of generating `output_len` tokens for each prompt of `case`."""
        message = {"command": "run", "case": asdict(case), "sampling": asdict(sampling)}
        return self._ask(message | {"output_len": output_len, "prompt_seed": prompt_seed}, "ran")["seconds"]

    def memory(self) -> tuple[int, str]:
        reply = self._ask({"command": "memory"}, "memory")
        return reply["mib"], reply["counts"]

    def profile(self, case: Case, sampling: Sampling, prompt_seed: str, trace_path: Path) -> dict[str, Any]:
        message = {"command": "profile", "case": asdict(case), "sampling": asdict(sampling)}
        message |= {"prompt_seed": prompt_seed, "trace_path": str(trace_path.absolute())}
        return self._ask(message, "profiled")["tables"]

    def close(self) -> None:
        """End the worker: first by asking, then with its whole process group."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                send(self._process.stdin, {"command": "quit"})
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(QUIT_SECONDS)
        self._kill_group()
        self._log.close()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put(None)

    def _ask(self, message: Mapping[str, Any], expected: str) -> dict[str, Any]:
        try:
            assert self._process.stdin is not None
            send(self._process.stdin, message)
            line = self._next_line()
        except (OSError, ValueError):  # the pipe is broken or closed
            line = None
        if line is None:
            self._kill_group()
            raise WorkerDied(
                f"{self.mode.name}: the worker ended (exit code {self._process.returncode}). {self._tail()}"
            )
        reply = json.loads(line)
        if reply["event"] == "error":
            self._log.write(reply["traceback"])
            raise EngineFailed(f"{reply['kind']}: {reply['message']}")
        assert reply["event"] == expected, f"asked for {expected}, got {reply}"
        return reply

    def _next_line(self) -> str | None:
        """The next reply, or None once the worker has ended; a child may hold its pipe open, so poll for that too."""
        deadline = time.monotonic() + self._timeout
        while True:
            with contextlib.suppress(queue.Empty):
                return self._replies.get(timeout=min(1.0, max(deadline - time.monotonic(), 0.01)))
            if self._process.poll() is not None and self._replies.empty():
                return None
            if time.monotonic() > deadline:
                self._kill_group()
                raise WorkerDied(f"{self.mode.name}: no answer within {self._timeout:g} s, stopped. {self._tail()}")

    def _tail(self) -> str:
        self._log.flush()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return "Its last lines: " + " | ".join(lines[-LOG_TAIL_LINES:]) if lines else "It wrote nothing."
