"""Decode under load: what is made of the driver's words, and the table."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import sustained
from benchmarks.sustained import GpuLog, Sample, parse_sample

ROOT = Path(sustained.__file__).parent.parent


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1980, 616.21\n", Sample(7.0, 1980.0, 616.21)),
        ("1980 MHz, 616.21 W\n", Sample(7.0, 1980.0, 616.21)),
        ("1980, [N/A]\n", None),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_samples(line: str, expected: Sample | None) -> None:
    assert parse_sample(line, 7.0) == expected


def test_means_are_over_the_time_asked_for() -> None:
    log = GpuLog()
    log.samples = [Sample(1.0, 100.0, 10.0), Sample(2.0, 200.0, 30.0), Sample(3.0, 400.0, 50.0), Sample(9.0, 1.0, 1.0)]
    assert log.means(2.0, 3.0) == {"clock_mhz": 300.0, "watts": 40.0}
    assert log.means(4.0, 8.0) == {"clock_mhz": None, "watts": None}


def test_without_a_gpu_there_is_nothing_to_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sustained, "query_command", lambda *fields: None)
    with GpuLog() as log:
        assert log.means(0.0, 1e9) == {"clock_mhz": None, "watts": None}


def test_the_log_reads_what_the_tool_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1980, 616.0\necho broken\necho 1500, 700.0\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with GpuLog() as log:
        deadline = time.monotonic() + 30
        while len(log.samples) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [sample[1:] for sample in log.samples] == [(1980.0, 616.0), (1500.0, 700.0)]


def test_the_table() -> None:
    step = {"shape": "8b", "load": "step", "tokens": 64, "context": 128, "burst_us": 4517.2, "sustained_us": 4604.4}
    part = step | {"load": "down", "burst_us": None, "sustained_us": 53.75, "clock_mhz": None, "watts": None}
    text = sustained.table({"rows": [step | {"clock_mhz": 1790.4, "watts": 694.6}, part]})
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:])
    assert first == ["8B step", "64 x 128", "4517", "4604", "1790", "695"]
    assert second == ["8B down", "64 x 128", "-", "53.8", "-", "-"]


def test_no_gpu_is_one_line() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.sustained"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 2 and run.stderr.startswith("benchmarks.sustained: the CUDA kernels need")
    assert len(run.stderr.splitlines()) == 1


def test_cases_that_are_none_are_named() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.sustained", "--cases", "64x128,256"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "argument --cases: invalid cases value: '64x128,256'" in run.stderr
