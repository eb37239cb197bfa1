"""The exact text of the printed block and of both kinds of table; CSV columns; plots; results files."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import block, plot_file, plots
from benchmarks.boxed_tables import Column, boxed_table, profile_boxes
from benchmarks.cases import SAMPLINGS, SUITES, Case
from benchmarks.csv_file import COLUMNS, write_csv
from benchmarks.engines import MODES
from benchmarks.hardware_csv import read_hardware_csv
from benchmarks.metrics import Timing, compute_metrics
from benchmarks.record import DROPPED, Measurement, Record
from benchmarks.throughput_tables import figures_table, floors_table, startup_table, throughput_tables
from llama3.errors import ConfigError, RequestError
from tests import benchmark_records as records

PUBLISHED = Path(__file__).parent.parent / "benchmarks" / "hardware" / "llama2_7b_vhk158.csv"


def test_the_block_of_one_case_word_for_word():
    record = records.make_record({})
    case = Case(1, 128, 128)
    timing = Timing((1.4909467697143555,), (0.25,))
    metrics = compute_metrics(record.config, record.dtype, case, timing, record.peaks)
    measurement = Measurement("ours", case, "mission", timing, metrics, (2868, "allocated"))
    lines = [
        *block.heading(MODES["ours"], "unsloth/Llama-3.2-1B", case),
        block.using_device("cuda"),
        block.COMPILING,
        block.WARMING_UP,
        block.RUNNING,
        *block.result(measurement, SAMPLINGS["mission"]),
    ]
    expected = """\
Benchmarking custom llama3 model inference implementation:
==================================
model name: unsloth/Llama-3.2-1B
batch size: 1
max output tokens: 128
input tokens: 128
max model sequence length: 256
==================================
using device: cuda
compiling the model...
model warmup...
running inference...
duration: 1.4909467697143555 Seconds | throughput: 85.85148886604651 Toks/sec
peak memory consumption: 2868 MiB"""
    assert "\n".join(lines[:14]) == expected
    expected = """\
sampling: temperature 0.6, top-p 0.9; median of 1, throughput 85.9 to 85.9 Toks/sec
time to first token (TTFT): 250.00 ms
time per output token (TPOT): 9.7712 ms
prefill: 512.0 Toks/sec | MFU: 0.1%
decode: 102.3 Toks/sec | 253.6 GB/s | 5.5% of the floor's 1850.3 Toks/sec"""
    assert "\n".join(lines[14:]) == expected


def test_the_block_of_a_failure_says_why():
    failed = Measurement("ours", Case(1, 2, 3), "greedy", error="CapacityError: too little")
    assert block.result(failed, SAMPLINGS["greedy"]) == ["failed: CapacityError: too little"]


def test_throughput_tables_side_by_side():
    record = records.make_record({"ours": 0.001, "vllm-default": 0.003, "vllm-inprocess": 0.002, "hf-eager": None})
    expected = """\
### Batched inference: 1b on H200, temperature 0.6, top-p 0.9

| Batch Size | Input / Output Toks | Custom Throughput | vLLM Throughput | HF Throughput | Custom / vLLM | Custom / HF |
| ---------- | ------------------- | ----------------- | --------------- | ------------- | ------------- | ----------- |
| 256        | 128, 128            | 239182.48         | 119591.24       | failed        | 2.00x         | -           |
| 64         | 128, 2048           | 63719.98          | 31859.99        | failed        | 2.00x         | -           |
| 16         | 2048, 128           | 14948.91          | 7474.45         | failed        | 2.00x         | -           |
| 16         | 2048, 2048          | 15930.00          | 7965.00         | failed        | 2.00x         | -           |

### Single user inference: 1b on H200, temperature 0.6, top-p 0.9

| Batch Size | Input / Output Toks | Custom Throughput | vLLM Throughput | HF Throughput | Custom / vLLM | Custom / HF |
| ---------- | ------------------- | ----------------- | --------------- | ------------- | ------------- | ----------- |
| 1          | 128, 128            | 934.31            | 467.15          | failed        | 2.00x         | -           |
| 1          | 128, 2048           | 995.62            | 497.81          | failed        | 2.00x         | -           |
| 1          | 2048, 128           | 934.31            | 467.15          | failed        | 2.00x         | -           |
| 1          | 2048, 2048          | 995.62            | 497.81          | failed        | 2.00x         | -           |
"""
    assert throughput_tables(record) == expected


def test_throughput_tables_of_each_sampling_and_of_one_engine():
    record = records.make_record({"vllm-default": 0.003}, samplings=("mission", "greedy"))
    text = throughput_tables(record)
    assert text.count("Batched inference") == 2 and "1b on H200, greedy" in text
    assert "| Batch Size | Input / Output Toks | vLLM Throughput |\n" in text
    assert throughput_tables(record, only="greedy").count("Batched inference") == 1


def test_boxes_of_the_published_profile_have_its_layout():
    hardware = read_hardware_csv(PUBLISHED)
    text = boxed_table("llama2-7B", [(case, [column[case] for column in hardware]) for case in SUITES["profile"]])
    expected = """\
+--------Case: llama2-7B, (Batch 1, Prefill 128, Decode  512)--------+
| Hardware                 |  GPU-naive  |   GPU-opt   | VHK158 FPGA |
| Prefill time (ms)        |      26.1   |      17.6   |      289.9  |
| Decode time (ms)         |   11316.9   |    5727.0   |     4946.4  |
| Total time (ms)          |   11343.0   |    5744.6   |     5236.3  |
| Avg throughput (token/s) |      45.2   |      89.4   |      103.5  |
| VHK158 speedup ratio     |     2.166   |     1.097   |      1.000  |"""
    assert text.splitlines()[:7] == expected.splitlines()
    lines = text.splitlines()
    assert len(lines) == 6 * 7 + 1 and {len(line) for line in lines} == {70}
    assert lines[14] == "+--------Case: llama2-7B, (Batch 1, Prefill 128, Decode 1536)--------+"
    assert lines[19:21] == [
        "| Avg throughput (token/s) |      44.9   |      87.5   |       95.4  |",
        "| VHK158 speedup ratio     |     2.087   |     1.072   |      1.000  |",
    ]
    assert lines[-1] == "+" + "-" * 68 + "+"


def test_profile_boxes_put_other_hardware_first_and_this_engine_last():
    record = records.make_record({"ours": 0.001, "vllm-default": 0.002, "hf-eager": None}, suite="profile")
    text = profile_boxes(record, "mission", read_hardware_csv(PUBLISHED)[2:])
    assert text.splitlines()[:7] == [
        "+------------------Case: 1b, (Batch 1, Prefill 128, Decode  512)-------------------+",
        "| Hardware                 | VHK158 FPGA |      HF     |     vLLM    |    Custom   |",
        "| Prefill time (ms)        |     289.9   |         -   |      20.0   |       10.0  |",
        "| Decode time (ms)         |    4946.4   |         -   |    1022.0   |      511.0  |",
        "| Total time (ms)          |    5236.3   |         -   |    1042.0   |      521.0  |",
        "| Avg throughput (token/s) |     103.5   |         -   |     500.0   |     1000.0  |",
        "| Custom speedup ratio     |    10.050   |         -   |     2.000   |      1.000  |",
    ]


def test_a_long_name_widens_its_column():
    column = Column("A very long hardware name", 1.0, 2.0, 10)
    lines = boxed_table("m", [(Case(1, 1, 10), [column, replace(column, name="x")])]).splitlines()
    assert len({len(line) for line in lines}) == 1 and "| A very long hardware name |" in lines[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hardware,batch_size\nx,1\n", "columns prefill, decode, prefill_ms, decode_ms are missing"),
        ("hardware,batch_size,prefill,decode,prefill_ms,decode_ms\n", "no row"),
        ("hardware,batch_size,prefill,decode,prefill_ms,decode_ms\nx,1,128,512,fast,3\n", "line 2 is not a case"),
        ("hardware,batch_size,prefill,decode,prefill_ms,decode_ms\nx,1,0,512,1,3\n", "input_len 0"),
    ],
)
def test_a_hardware_csv_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "h.csv").write_text(text)
    with pytest.raises(RequestError, match=message):
        read_hardware_csv(tmp_path / "h.csv")
    with pytest.raises(RequestError, match="cannot be read"):
        read_hardware_csv(tmp_path / "missing.csv")


def test_figures_show_every_mode_and_every_failure():
    record = records.make_record({"ours": 0.001, "vllm-default": 0.003, "vllm-inprocess": None})
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in figures_table(record).splitlines()]
    assert len(rows) == 2 + 3 * 8
    assert rows[2 + 4] == [
        "Custom", "1, 128/128", "mission", "3", "934.3", "2.0%", "10.00", "1.0000", "12800", "3.2%", "1000.0",
        "2478", "54.0%",
    ]  # fmt: skip
    assert rows[-1][:6] == ["vLLM in-process", "1, 2048/2048", "mission", "-", "failed", "-"]


def test_floors_and_startup_tables():
    record = records.make_record({})
    assert "| 1 x 2048/2048  | 5265.48         | 1782.5             |" in floors_table(record, SUITES["seed"])
    record.startup = {
        "ours": {"first": 9.0, "seconds": [5.0, 6.0, 7.0], "loads": [1, 1, 1], "median": 6.0},
        "vllm-default": {"error": "no"},
    }
    expected = """\
| engine | process start to first token, s | repetitions   | first time |
| ------ | ------------------------------- | ------------- | ---------- |
| Custom | 6.0                             | 5.0, 6.0, 7.0 | 9.0        |
| vLLM   | failed                          | -             | -          |"""
    assert startup_table(record) == expected


def test_csv_has_a_row_a_measurement_and_fixed_columns(tmp_path):
    record = records.make_record({"ours": 0.001, "hf-eager": None})
    write_csv(record, tmp_path / "new" / "r.csv")
    with open(tmp_path / "new" / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS == (
        "model", "dtype", "engine", "sampling", "batch_size", "input_len", "output_len", "repetitions", "duration",
        "throughput", "throughput_low", "throughput_high", "ttft", "prefill_tok_s", "prefill_mfu", "decode_seconds",
        "tpot_ms", "decode_tok_s", "decode_gb_s", "decode_floor_tok_s", "decode_floor_fraction", "peak_memory_mib",
        "error",
    )  # fmt: skip
    assert len(rows) == 16
    assert (rows[0]["engine"], rows[0]["batch_size"], rows[0]["repetitions"]) == ("ours", "256", "3")
    assert float(rows[0]["throughput"]) == pytest.approx(239182.48, abs=0.01) and rows[0]["error"] == ""
    assert rows[-1]["error"] == "RuntimeError: it broke" and rows[-1]["throughput"] == ""


def test_results_come_back_from_their_file_as_they_were(tmp_path):
    record = records.make_record({"ours": 0.001, "vllm-default": None}, samplings=("mission", "greedy"))
    record.notes.append("time budget: two of three")
    record.save(tmp_path / "a" / "r.json")
    loaded = Record.load(tmp_path / "a" / "r.json")
    assert loaded == record
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["r.json"]
    assert loaded.best("vllm", Case(1, 128, 128), "mission") is None
    assert loaded.families() == ["ours", "vllm"]


WHOLE = records.make_record({"ours": 0.001}).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({"format": 99}),
        json.dumps({"format": 1}),
        json.dumps(WHOLE | {"dtype": "int3"}),
        json.dumps(WHOLE | {"more": 1}),
        json.dumps(WHOLE | {"measurements": [{**WHOLE["measurements"][0], "metrics": {"throughput": 1.0}}]}),
        json.dumps(WHOLE | {"measurements": [{**WHOLE["measurements"][0], "engine": "theirs"}]}),
    ],
)
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.json"):
        Record.load(tmp_path / "r.json")


def test_a_second_measurement_takes_the_place_of_the_first():
    record = records.make_record({"ours": 0.001})
    first = record.find("ours", Case(1, 128, 128), "mission")
    again = replace(first, peak_memory=(1, "measured again"))
    record.add(again)
    assert len(record.measurements) == 8 and record.find("ours", Case(1, 128, 128), "mission") is again
    assert record.measurements.index(again) == record.cases().index(again.case) == 4
    failed = Measurement("ours", Case(1, 128, 128), "mission", error="later")
    record.add(failed)
    assert record.find("ours", Case(1, 128, 128), "mission") is again
    new = Measurement("hf-eager", Case(1, 128, 128), "mission", error="at first")
    record.add(new)
    record.add(replace(new, error="again"))
    assert record.find("hf-eager", Case(1, 128, 128), "mission").error == "again"


def test_what_was_not_measured_is_said():
    record = records.make_record({"ours": 0.001, "vllm-default": 0.002})
    assert record.gaps() == []
    cases = record.cases()
    record.measurements = [m for m in record.measurements if (m.engine, m.case) != ("vllm-default", cases[3])]
    assert record.gaps() == [f"vLLM was not measured at {cases[3]}"]
    greedy = replace(record.measurements[0], sampling="greedy")
    record.add(greedy)
    others = "; ".join(f"{case} greedy" for case in cases[1:])
    assert record.gaps()[0] == f"Custom was not measured at {others}"


@pytest.mark.parametrize(
    ("device", "subject"),
    [
        ("NVIDIA H200", "1b on H200"),
        ("NVIDIA H100 80GB HBM3", "1b on H100"),
        ("NVIDIA A100-SXM4-80GB", "1b on A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 4090", "1b on RTX 4090"),
        ("NVIDIA RTX A6000", "1b on RTX A6000"),
        ("Tesla T4", "1b on Tesla T4"),
        ("CPU", "1b on CPU"),
        ("", "1b"),
    ],
)
def test_a_gpu_goes_by_its_name_and_number(device, subject):
    record = records.make_record({"ours": 0.001})
    assert replace(record, environment={"device": device}).subject == subject


def test_dropped_repetitions_are_noted_while_there_are_any():
    record = records.make_record({"ours": 0.001, "vllm-default": 0.002})
    record.notes.append("another note")
    last = record.measurements[-1]
    record.add(replace(last, timing=Timing(last.timing.total[:1], last.timing.one_token[:1])))
    record.note_dropped(repeats=3)
    said = ["another note", f"time budget (vllm-default): {DROPPED}"]
    assert record.notes == said
    record.note_dropped(repeats=3)
    assert record.notes == said
    record.add(last)
    record.note_dropped(repeats=3)
    assert record.notes == ["another note"]


def test_a_plot_is_small_and_knows_its_data(tmp_path):
    pytest.importorskip("matplotlib")
    data = plots.plot_data(records.make_record({"ours": 0.001, "vllm-default": 0.002, "hf-eager": None}), "mission")
    assert len(data["panels"]) == 8 and data["panels"][0]["bars"] == {"ours": 239182.5, "vllm": 119591.2}
    assert re.match(r"batch 1, 2048/2048", data["panels"][-1]["title"])
    path = tmp_path / "images" / "p.png"
    plots.draw(data, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size < 100_000
    assert plot_file.digest_in_png(path) == plot_file.data_digest(data)
    assert plot_file.digest_in_png(tmp_path / "none.png") is None
    plots.draw({"title": "nothing", "panels": []}, tmp_path / "empty.png")
