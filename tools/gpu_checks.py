"""Everything that must be seen to hold on a GPU: the tests marked `gpu`, and test_llama3.py at full size.

    python tools/gpu_checks.py --json results/gpu_checks.json

Writes random models in the real shapes to a temporary folder (18 GB for 1b and 8b) and takes a few minutes.
Exit code 1 if anything failed.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import environment
from benchmarks.json_file import write_json
from llama3.shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent

SECONDS_A_TEST = 60  # more than any takes

# What a result depends on: a figure belongs to one state of these.
SOURCES = ("llama3", "csrc", "tests", "load_custom_kernels.py", "test_llama3.py")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--shapes", default="1b,8b", help=f"of {', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--processes", default="4", help="pytest-xdist's -n (default: %(default)s)")
    args = parser.parse_args(arguments)
    report: dict[str, Any] = {"environment": environment.describe(), "sources": source_digest(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        report["tests"] = run_tests(Path(folder) / "tests.xml", args.processes)
        report["models"] = [run_full_size(shape, Path(folder)) for shape in tqdm(args.shapes.split(","), "full size")]
    write_json(report, args.json)
    failed = sum(counts["failed"] for counts in report["tests"]["files"].values())
    print(f"{failed} failed in {report['tests']['seconds']:.0f} s; {args.json}")
    return int(failed > 0)


def source_digest(root: Path) -> str:
    """A hash over the files that the results depend on, the same in every clone of one commit."""
    digest = hashlib.sha256()
    for top in SOURCES:
        files = [root / top] if (root / top).is_file() else (root / top).rglob("*")
        for path in sorted(p for p in files if p.is_file() and "__pycache__" not in p.parts):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run_tests(xml: Path, processes: str) -> dict[str, Any]:
    """Run the tests marked `gpu`; {"seconds", "files": {file: {"passed", "failed", "skipped"}}}."""
    start = time.perf_counter()
    # Without the options of pyproject.toml: a GPU machine need not have the plugins that they are for.
    options = ["-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-q", "-m", "gpu", "-n", processes]
    options += ["-o", f"faulthandler_timeout={SECONDS_A_TEST}"]  # says which test hangs, and where
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={xml}"]
    subprocess.run(command, cwd=ROOT, check=False)
    return {"seconds": time.perf_counter() - start, "files": count_by_file(xml)}


def count_by_file(xml: Path) -> dict[str, dict[str, int]]:
    """Outcomes in a JUnit file, by test file."""
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        outcomes = {child.tag for child in case}
        bad = "failed" if outcomes & {"failure", "error"} else "passed"
        name = case.get("classname", "").replace(".", "/") + ".py"
        counts.setdefault(name, Counter())["skipped" if "skipped" in outcomes else bad] += 1
    return {name: {k: found[k] for k in ("passed", "failed", "skipped")} for name, found in sorted(counts.items())}


def run_full_size(shape: str, folder: Path) -> dict[str, Any]:
    """test_llama3.py on a random model: its figures, and the seconds that it took to write the model."""
    model, figures = folder / shape, folder / f"{shape}.json"
    start = time.perf_counter()
    _run("tools/make_random_model.py", "--shape", shape, str(model))
    written = time.perf_counter() - start
    _run("test_llama3.py", "--model_name", str(model), "--max_gen_len", "64", "--json", str(figures))
    largest = max(p.stat().st_size for p in model.glob("*.safetensors")) / 2**20
    return {"shape": shape, "write_seconds": written, "largest_shard_mib": largest} | json.loads(figures.read_text())


def _run(*command: str) -> None:
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environ, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
