"""Two or more trees of this project on one GPU in turn, under sustained load: what differs then is the code.

    python -m benchmarks.in_turn ../before . --shape 8b --cases 64x128,64x1184 --json results/in_turn/h200.json

Two GPUs of one kind differ by more than most changes bring, and one GPU from minute to minute, with its temperature and
so its clock. Here every tree has a process with its own modules and kernels, and while one measures the others wait.
Contexts that are a multiple of 64 spare attention the last tile of a cache, which is else partly full: take others too.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.json_file import write_json
from benchmarks.protocol import send
from benchmarks.sustained import cases
from benchmarks.text_table import markdown_table, number
from llama3.errors import UserError

WORKER = Path(__file__).with_name("in_turn_worker.py")


class Tree:
    """A worker with the modules of one tree."""

    def __init__(self, folder: Path, arguments: Sequence[str], worker: Path = WORKER) -> None:
        if not (folder / "benchmarks" / "sustained.py").is_file():
            raise UserError(f"{folder} has no benchmarks/sustained.py: give folders that hold this project")
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(worker.resolve()), *arguments],  # -P: modules of the tree, not of the script
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, load: str, tokens: int, context: int) -> dict[str, Any]:
        """What `benchmarks.sustained.measure` gives there. Raises UserError if the worker has died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            send(stdin, {"load": load, "tokens": tokens, "context": context})
            return json.loads(stdout.readline())
        except (OSError, ValueError) as error:
            raise UserError(f"the worker of {self.folder} ended during {load} {tokens}x{context}: see above") from error

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died with a request unread
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def run(trees: Sequence[Tree], shape: str, load: str, wanted: Sequence[tuple[int, int]], turns: int) -> list[dict]:
    """A row for each case, turn and tree, in the order in which they were measured."""
    rows = []
    for tokens, context in wanted:
        for turn in range(turns):
            for index, tree in enumerate(trees):
                row = {"tree": index, "turn": turn, "shape": shape, "load": load, "tokens": tokens, "context": context}
                rows.append(row | tree.measure(load, tokens, context))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a case: each tree's means for seconds, and how much less time the last takes than the first."""
    grouped: dict[tuple, dict[int, list[float]]] = {}
    for row in rows:
        case = (f"{row['shape'].upper()} {row['load']}", f"{row['tokens']} x {row['context']}")
        grouped.setdefault(case, {}).setdefault(row["tree"], []).append(row["sustained_us"])
    lines = []
    for case, times in grouped.items():
        means = [sum(of_tree) / len(of_tree) for of_tree in times.values()]
        lines.append([*case, *(number(mean, int(mean < 1000)) for mean in means), f"{1 - means[-1] / means[0]:.1%}"])
    names = [f"tree {tree} (µs)" for tree in sorted({row["tree"] for row in rows})]
    return markdown_table(("load", "rows x context", *names, "less time"), lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs="+", type=Path, help="folders, each with kernels already built or to be built")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--load", default="step", help="of benchmarks.sustained (default: %(default)s)")
    parser.add_argument("--cases", type=cases, default="64x128,64x1184,256x160", help="by comma, ROWSxCONTEXT")
    parser.add_argument("--seconds", type=float, default=0.7, help="of each measurement")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    trees: list[Tree] = []
    try:
        for folder in options.trees:
            trees.append(Tree(folder, (options.shape, str(options.seconds))))
        rows = run(trees, options.shape, options.load, options.cases, options.turns)
    except UserError as error:
        print(f"benchmarks.in_turn: {error}", file=sys.stderr)
        return 2
    finally:
        for tree in trees:
            tree.close()
    print(table(rows))
    if options.json:
        write_json({**describe(), "rows": rows}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
