"""Start-up: from the start of a fresh process to its first token, with everything that lies between.

The worker's process is started, imports, loads the weights from their folder, gets ready for one sequence, and
generates one token. The first repetition warms the file cache and whatever the engine caches on disk; it is recorded
apart.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.cases import SAMPLINGS, Case
from benchmarks.engines import LoadSpec
from benchmarks.worker_client import EngineFailed, WorkerClient, WorkerDied

STARTUP_CASE = Case(batch_size=1, input_len=128, output_len=128)


def measure_startup(
    start_worker: Callable[[], WorkerClient], spec: LoadSpec, repeats: int, seed: int
) -> dict[str, Any]:
    """Seconds to the first token: `first` of the first process, `seconds` of `repeats` more, and their median.

    `loads`: the part of each that the engine spent on loading. An `error` in place of them if a process failed.
    """
    try:
        runs = [_once(start_worker, spec, f"{seed}/startup {i}") for i in range(repeats + 1)]
    except (EngineFailed, WorkerDied) as error:
        return {"error": str(error)}
    warm = [seconds for seconds, _ in runs[1:]]
    return {
        "first": runs[0][0],
        "seconds": warm,
        "loads": [load for _, load in runs[1:]],
        "median": statistics.median(warm),
    }


def _once(start_worker: Callable[[], WorkerClient], spec: LoadSpec, prompt_seed: str) -> tuple[float, float]:
    with start_worker() as worker:
        load_seconds = worker.load(spec)["seconds"]
        worker.prepare(STARTUP_CASE)
        worker.run(STARTUP_CASE, 1, SAMPLINGS["greedy"], prompt_seed)
        return time.perf_counter() - worker.started_at, load_seconds
