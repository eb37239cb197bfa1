"""The script end to end on a CPU: this engine and transformers on a tiny model, its flags, and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmark_model
from benchmarks.cases import SAMPLINGS, SUITES, Case
from benchmarks.peaks import known_peaks
from benchmarks.record import Record
from benchmarks.run import NothingMeasured, execute
from benchmarks.target import Target
from llama3.errors import ConfigError, RequestError, UserError

ROOT = Path(__file__).parent.parent
TINY = ["--shape", "tiny", "--device", "cpu"]


def parse(*flags: str):
    return benchmark_model.parse_args([*flags])


def test_the_flags_of_one_case_with_underscores_and_dashes():
    flags = ["--model_name", "m", "--max_gen_batch_size=4", "--max_gen_len", "7", "--input_len=9", "--random_seed=5"]
    for spelling in (flags, [flag.replace("_", "-") for flag in flags]):
        args = parse(*spelling)
        assert args.model_name == "m" and args.random_seed == 5
        assert args.suites == [("single", (Case(4, 9, 7),), (SAMPLINGS["mission"],))]
        assert [mode.name for mode in args.modes] == ["ours"] and args.is_single


def test_engines_suites_and_ways_of_sampling():
    assert [m.name for m in parse("--use_vllm_impl").modes] == ["vllm-default", "vllm-inprocess"]
    assert [m.name for m in parse("--use_hf_impl").modes] == ["hf-eager"]
    names = [m.name for m in parse("--engines", "ours, vllm,hf,hf-static,vllm-default").modes]
    assert names == ["ours", "vllm-default", "vllm-inprocess", "hf-eager", "hf-static"]
    seed, profile = parse("--suite", "seed, profile", "--json", "{suite}.json").suites
    assert seed.name == "seed" and seed.cases == SUITES["seed"] and len(seed.cases) == 8 and len(seed.samplings) == 2
    assert [(c.input_len, c.output_len) for c in profile.cases] == [
        (128, 512), (128, 1024), (128, 1536), (512, 512), (512, 1024), (512, 1536),
    ]  # fmt: skip
    assert profile.name == "profile" and profile.samplings == (SAMPLINGS["greedy"],)
    assert parse("--suite", "seed", "--sampling", "mission").suites[0].samplings == (SAMPLINGS["mission"],)
    assert parse("--vllm_options", '{"max_num_seqs": 8}').vllm_options == {"max_num_seqs": 8}
    assert parse("--longest", '{"hf": 512, "vllm-default": 128}').longest == {"hf": 512, "vllm-default": 128}


def test_scenarios_come_as_json_or_from_a_file(tmp_path):
    text = '[[1, 2, 3], {"batch_size": 4, "input_len": 5, "output_len": 6}, [1, 2, 3]]'
    (tmp_path / "cases.json").write_text(text)
    for value in (text, str(tmp_path / "cases.json")):
        assert parse("--scenarios", value).suites[0][:2] == ("scenarios", (Case(1, 2, 3), Case(4, 5, 6)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scenarios", "nonsense"], "neither a file nor JSON"),
        (["--scenarios", "[[1, 2]]"], "a case is"),
        (["--scenarios", "[]"], "at least one case"),
        (["--suite", "seed", "--scenarios", "[[1,2,3]]"], "give one of them"),
        (["--engines", "ours,theirs"], "names 'theirs'"),
        (["--suite", "seed,sead"], "names 'sead'; there are seed, profile"),
        (["--suite", "seed,profile", "--json", "one.json"], "must hold"),
        (["--longest", '{"theirs": 5}'], "holds 'theirs'"),
        (["--longest", '{"hf": 0}'], "number of tokens"),
        (["--engines", "ours", "--use_hf_impl"], "give one of them"),
        (["--max_gen_len", "0"], "output_len 0"),
        (["--repeats", "0"], "at least 1"),
        (["--append"], "--json"),
        (["--startup", "--profile", "t.json"], "one after the other"),
        (["--suite", "seed,profile", "--startup"], "take one suite"),
        (["--suite", "seed", "--sampling", "both", "--profile", "t.json"], "one way of sampling"),
        (["--plot", "plot.jpg"], "does not end in .png"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message):
    with pytest.raises(RequestError, match=message):
        parse(*flags)


def test_a_model_or_a_case_that_cannot_be_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(UserError):
        execute(parse("--model_name", str(tmp_path / "missing")))
    with pytest.raises(RequestError, match="needs 140000 positions"):
        execute(parse(*TINY, "--input_len", "139999", "--max_gen_len", "1"))


def test_this_engine_and_transformers_side_by_side(tmp_path, capsys):
    json_path, csv_path = tmp_path / "out" / "r.json", tmp_path / "out" / "r.csv"
    flags = [*TINY, "--scenarios", "[[2, 16, 8], [1, 32, 4]]", "--sampling", "both", "--repeats", "2"]
    flags += ["--read_bandwidth", "2e10", "--matrix_peak", "1e12", "--json", str(json_path)]
    execute(parse(*flags, "--engines", "ours", "--csv", str(csv_path)))
    (record,) = execute(parse(*flags, "--engines", "hf", "--append"))
    printed = capsys.readouterr().out
    assert "| batch x in/out | decode reads GB | decode floor tok/s |" in printed
    assert "| 2          | 16, 8               | " in printed and "Custom / HF" in printed
    assert len(csv_path.read_text().splitlines()) == 1 + 4
    assert Record.load(json_path) == record and len(record.measurements) == 8
    for m in record.measurements:
        assert m.error is None and len(m.timing.total) == 2
        assert m.metrics.ttft > 0 and m.metrics.throughput > 0 and m.peak_memory[0] > 0
    engines = record.engines
    assert engines["ours"]["kernels"].startswith("reference ops") and engines["hf-eager"]["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match=r"holds tiny in torch\.bfloat16"):
        execute(parse(*TINY, "--dtype", "float32", "--json", str(json_path), "--append"))
    with pytest.raises(ConfigError, match="begun with other peaks"):
        execute(parse(*TINY, "--read_bandwidth", "1e10", "--json", str(json_path), "--append"))
    with pytest.raises(NothingMeasured):  # what fails leaves the figures that there are
        execute(parse(*flags, "--engines", "ours", "--append", "--ours_options", '{"nonsense": 1}'))
    assert Record.load(json_path).measurements == record.measurements


def test_two_suites_from_one_start_in_a_file_each(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmark_model.SUITES", {"seed": (Case(2, 8, 4),), "profile": (Case(1, 8, 4), Case(1, 8, 9))})
    monkeypatch.setattr("benchmark_model._SUITE_NAMES", "seed, profile")
    flags = ["--suite", "seed,profile", "--repeats", "1", "--longest", '{"ours": 4}']
    flags += ["--json", str(tmp_path / "{suite}-tiny.json"), "--csv", str(tmp_path / "{suite}.csv")]
    seed, profile = execute(parse(*TINY, *flags))
    assert capsys.readouterr().out.count("ours: starting") == 1
    assert seed == Record.load(tmp_path / "seed-tiny.json") and profile == Record.load(tmp_path / "profile-tiny.json")
    assert [(m.case, m.sampling) for m in seed.measurements] == [(Case(2, 8, 4), "mission"), (Case(2, 8, 4), "greedy")]
    assert [m.case for m in profile.measurements] == [Case(1, 8, 4)]
    assert profile.gaps() == ["Custom was not measured at 1 x 8/9"] and not seed.gaps()
    with pytest.raises(RequestError, match="leaves out every case"):
        execute(parse(*TINY, "--max_gen_len", "16", "--longest", '{"ours": 4}'))
    assert seed.engines == profile.engines and (tmp_path / "profile.csv").exists()


def test_the_script_prints_the_block_and_fails_where_every_engine_fails(tmp_path):
    def script(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "benchmark_model.py"), *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)

    done = script(*TINY, "--max-gen-len=4", "--input-len=8", "--repeats=1", "--engines=ours,vllm-default")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:12] == [
        "Benchmarking custom llama3 model inference implementation:",
        "==================================",
        "model name: tiny",
        "batch size: 1",
        "max output tokens: 4",
        "input tokens: 8",
        "max model sequence length: 12",
        "==================================",
        "using device: cpu",
        "compiling the model...",
        "model warmup...",
        "running inference...",
    ]
    assert lines[12].startswith("duration: ") and " Seconds | throughput: " in lines[12]
    assert lines[13].startswith("peak memory consumption: ") and lines[13].endswith(" MiB")
    if "failed: " in done.stdout:  # vLLM is not installed: said, and the rest has run
        assert "failed: the engine did not start: ModuleNotFoundError: No module named 'vllm'" in lines[-1]
    wrong = script("--model_name", "missing/folder/here")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and len(wrong.stderr.splitlines()) == 1


def test_a_profile_on_a_cpu(tmp_path, capsys):
    trace, json_path = tmp_path / "new" / "trace.json.gz", tmp_path / "p.json"
    flags = [*TINY, "--json", str(json_path)]
    (record,) = execute(parse(*flags, "--input_len", "8", "--max_gen_len", "64", "--profile", str(trace)))
    printed = capsys.readouterr().out
    assert trace.stat().st_size > 1000 and f"trace: {trace}" in printed
    found = record.profiles[0]
    assert found["steps"] == found["op_steps"] > 40
    calls = {row["name"]: row["calls"] / found["op_steps"] for row in found["ops"]}
    assert calls == {"embed": 1, "qkv": 2, "attention": 2, "o": 2, "gate-up": 2, "down": 2, "head": 1, "sample": 1}
    assert json.loads(json_path.read_text())["profiles"] == record.profiles
    cases = ["--scenarios", "[[1, 8, 4], [1, 8, 64], [1, 6, 68]]", "--append"]  # the first is too short to be traced
    (again,) = execute(parse(*flags, *cases, "--profile", str(trace)))
    assert "1 x 8/4 failed: " in capsys.readouterr().out and trace.with_name("3-trace.json.gz").exists()
    assert [(p["input_len"], p["output_len"]) for p in again.profiles] == [(8, 64), (6, 68)]
    assert again.profiles[0] != record.profiles[0]


def test_startup_from_a_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.run.CHECKPOINTS", tmp_path / "checkpoints")
    (record,) = execute(parse(*TINY, "--startup", "--repeats", "1"))
    assert "ours: first token " in capsys.readouterr().out
    assert 0 < record.startup["ours"]["median"] < 60
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["tiny-bfloat16"]
    measured = dict(record.startup)
    record.add_startup("ours", {"error": "later"})
    assert record.startup == measured
    record.add_startup("hf-eager", {"error": "at first"})
    record.add_startup("hf-eager", measured["ours"])
    assert record.startup == measured | {"hf-eager": measured["ours"]}


def test_a_checkpoint_that_was_stopped_on_its_way_is_written_again(tmp_path, monkeypatch):
    target, folder = Target.from_shape("tiny", "auto", tmp_path / "config"), tmp_path / "checkpoints" / "tiny"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tools.make_random_model._write_weights", interrupt)
        target.with_weights(folder)
    assert not folder.exists()
    folder.mkdir()
    (folder / "model.safetensors").touch()  # of an older version, which wrote in place
    target.with_weights(folder)
    assert list(folder.glob("*.safetensors")) and [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_results_of_a_cpu_are_not_taken_for_a_gpu_s(tmp_path, monkeypatch):
    values = {"name": "NVIDIA H200", "memory.used": "5 MiB"}
    monkeypatch.setattr("benchmarks.environment.query_gpu", lambda *fields: [values.get(f, "0") for f in fields])
    (record,) = execute(parse(*TINY, "--device", "cpu", "--input_len", "8", "--max_gen_len", "4", "--repeats", "1"))
    assert record.subject == "tiny on CPU" and "driver" not in record.environment
    assert record.settings["gpu_before"] == record.engines["ours"]["gpu_after"] == {}
    assert record.peaks == known_peaks("CPU")


@pytest.mark.parametrize(("visible", "name"), [("", "1"), ("2,3", "3")])
def test_a_gpu_that_is_not_the_first_is_refused(monkeypatch, visible, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("benchmarks.run.resolve_device", lambda device: torch.device("cuda", 1))
    with pytest.raises(RequestError, match=f"run with CUDA_VISIBLE_DEVICES={name} and --device cuda"):
        execute(parse(*TINY))
