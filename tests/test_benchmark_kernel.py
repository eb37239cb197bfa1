"""The kernel benchmark's command line, its ncu table and its plot; the timing itself needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import decode_bench, ncu_table, plot_bandwidth

ROOT = Path(__file__).parent.parent

NCU = """shape: 32/8, 128: 64 x 4096
==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","void decode_attn<bf16, (int)128>(Params)","gpu__time_duration.sum","us","250.00"
"0","7","void decode_attn<bf16, (int)128>(Params)","dram__bytes_read.sum","Mbyte","1,074.50"
"0","7","void decode_attn<bf16, (int)128>(Params)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.5"
"1","7","void decode_attn<bf16, (int)128>(Params)","gpu__time_duration.sum","ns","252,000"
"1","7","void decode_attn<bf16, (int)128>(Params)","dram__bytes_read.sum","Gbyte","1.0745"
"1","7","void decode_attn<bf16, (int)128>(Params)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.5"
"""


def test_ncu_table():
    (row,) = ncu_table.parse(NCU.splitlines())
    assert (row.launches, row.dram_percent) == (2, 91.5)
    assert row.seconds == pytest.approx(251e-6)
    assert row.dram_bytes == pytest.approx(1.0745e9)
    assert "| decode_attn<bf16, 128> | 2 | 251.00 | 1074.5 | 4.281 | 91.5 |" in ncu_table.table([row])


def test_ncu_rows_are_stored_by_label(tmp_path: Path):
    (row,) = ncu_table.parse(NCU.splitlines())
    target = tmp_path / "ncu.json"
    for label in ("a", "b", "a"):
        ncu_table.store(row, target, label)
    rows = json.loads(target.read_text())["rows"]
    assert [r["label"] for r in rows] == ["b", "a"]
    assert rows[0] == {"label": "b", "launches": 2, "us": 251.0, "dram_MB": 1074.5, "percent_of_dram_peak": 91.5}


def test_ncu_table_without_csv():
    with pytest.raises(ValueError, match="--csv"):
        ncu_table.parse(["nothing here"])


def test_shapes_count_bytes():
    shape = decode_bench.Shape(32, 8, 128, 64, 4096)
    assert shape.kv_bytes == 2 * 2 * 64 * 4096 * 8 * 128
    ragged = decode_bench.SUITE[-1]
    assert len(ragged.lengths) == 32
    assert ragged.kv_bytes == 4 * (65536 + 31 * 4096) * 8 * 128
    # enough copies that a cache has left L2 (60 MB) when its turn comes again
    assert all(decode_bench.copies_for(s) * s.kv_bytes > 180e6 for s in decode_bench.SUITE if s.kv_bytes > 3e6)


def test_plot_draws_every_kernel(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"num_heads": 32, "head_dim": d, "batch": 1, "context": c, "kv_MB": c / 500, "us": {"ours": 5.0, "fa2": 9.0}}
        for d in (64, 128)
        for c in (256, 2048)
    ]
    target = tmp_path / "plots" / "bandwidth.png"
    data = plot_bandwidth.plot_data({"rows": rows, "read_ceiling_TBs": 4.585})
    assert data["panels"][1]["lines"]["fa2"] == [(256, 0.0569), (2048, 0.4551)]
    plot_bandwidth.draw(data, target)
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--suite"], ["--use_pytorch_kernel"]])
def test_without_a_gpu_it_is_one_line(arguments):
    result = subprocess.run(
        [sys.executable, "benchmark_kernel.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "CUDA GPU" in result.stderr


@pytest.mark.gpu
def test_peers_and_ours_agree_with_fp32():
    inputs = decode_bench.Inputs(decode_bench.Shape(32, 8, 128, 4, 512), copies=2)
    for name, make in {"ours": decode_bench.ours, **decode_bench.importable_peers()}.items():
        out = make(inputs)[0]()
        assert decode_bench.relative_error(out, inputs.truth(blocked=name == "ours")) < decode_bench.MAX_ERROR
