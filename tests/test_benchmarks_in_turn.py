"""Trees of the project in turn: whose modules a worker gets, the order, what a dead worker costs, and the table."""

import sys
from pathlib import Path

import pytest

from benchmarks import in_turn
from benchmarks.in_turn import Tree
from llama3.errors import UserError

WORKER = """
import json, sys
from benchmarks.sustained import NAME
for line in sys.stdin:
    request = json.loads(line)
    if request["load"] == "bad":
        sys.exit("no such load")
    print(json.dumps({"sustained_us": request["tokens"] * 10.0, "who": NAME, "arguments": sys.argv[1:]}), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "scripts" / "worker.py"
    path.parent.mkdir()
    path.write_text(WORKER)
    (path.parent / "benchmarks.py").write_text("raise ImportError('of the script, not of the tree')")
    return path


def make_tree(folder: Path, name: str) -> Path:
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / "__init__.py").touch()
    (folder / "benchmarks" / "sustained.py").write_text(f"NAME = {name!r}\n")
    return folder


def test_each_worker_has_the_modules_of_its_tree(worker: Path, tmp_path: Path) -> None:
    trees = [Tree(make_tree(tmp_path / name, name), ("8b", "0.5"), worker) for name in ("one", "two")]
    rows = in_turn.run(trees, "8b", "step", [(64, 128), (16, 100)], turns=2)
    assert [row["who"] for row in rows] == ["one", "two"] * 4
    assert [(row["tokens"], row["turn"]) for row in rows[::2]] == [(64, 0), (64, 1), (16, 0), (16, 1)]
    assert rows[0]["arguments"] == ["8b", "0.5"] and rows[0]["sustained_us"] == 640.0
    for tree in trees:
        tree.close()


def test_a_dead_worker_is_named(worker: Path, tmp_path: Path) -> None:
    tree = Tree(make_tree(tmp_path / "tree", "tree"), (), worker)
    for _ in range(2):  # dying, and dead
        with pytest.raises(UserError, match=r"tree ended during bad 64x128"):
            tree.measure("bad", 64, 128)
    tree.close()


def test_other_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["in_turn", str(tmp_path)])
    assert in_turn.main() == 2
    assert f"{tmp_path} has no benchmarks/sustained.py" in capsys.readouterr().err


def test_the_table() -> None:
    row = {"shape": "8b", "load": "step", "tokens": 64, "context": 128, "turn": 0}
    times = ((0, 4700.0), (1, 4600.0), (0, 4740.0), (1, 4640.0))
    rows = [row | {"tree": tree, "sustained_us": time} for tree, time in times]
    rows += [row | {"load": "down", "tree": tree, "sustained_us": time} for tree, time in ((0, 36.25), (1, 36.25))]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in in_turn.table(rows).splitlines()]
    assert lines[0] == ["load", "rows x context", "tree 0 (µs)", "tree 1 (µs)", "less time"]
    assert lines[2] == ["8B step", "64 x 128", "4720", "4620", "2.1%"]
    assert lines[3] == ["8B down", "64 x 128", "36.2", "36.2", "0.0%"]
