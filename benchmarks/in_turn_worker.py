"""One tree's side of `benchmarks.in_turn`: measures the loads that are asked for, a line of JSON each way.

Runs as a script with another tree's modules, so it goes by what `benchmarks.sustained` offers alone.
"""

import json
import sys
from collections.abc import Callable

import torch

from benchmarks.decode_products import Step
from benchmarks.sustained import GpuLog, loads, measure


def main() -> None:
    shape, seconds = sys.argv[1], float(sys.argv[2])
    step = Step(shape)
    case: tuple[int, int] | None = None
    found: dict[str, tuple[Callable[[], object], int]] = {}
    with GpuLog() as log:
        for line in sys.stdin:
            request = json.loads(line)
            wanted = (request["tokens"], request["context"])
            if wanted != case:  # one cache at a time, so nothing else may hold the last one
                found.clear()
                torch.cuda.empty_cache()
                case, found = wanted, loads(step, *wanted)
            print(json.dumps(measure(*found[request["load"]], log, seconds)), flush=True)


if __name__ == "__main__":
    main()
