"""README.md and docs/ show what the result files hold."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sections import NOTHING, plots, sections
from llama3.errors import ConfigError
from tests.benchmark_records import make_record
from tools import render_docs
from tools.figures import PROVIDERS, ops
from tools.figures.provider import Results
from tools.render_docs import ROOT, documents, render

SUITE = "results/decode_attn/suite.json"


def known() -> dict[str, str]:
    made: dict[str, str] = {}
    for provider in PROVIDERS:
        found = provider.sections(provider.read(ROOT))
        assert not made.keys() & found.keys(), "two providers have a section of the same name"
        made |= found
    return made


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The documents and the result files of this repository, to be changed."""
    for folder in ("docs", "results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "models/demo").mkdir(parents=True)
    for name in ("README.md", "models/demo/training.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def change(path: Path, keys: list[Any], value: object) -> None:
    document = json.loads(path.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(document))


def names(root: Path, check: bool) -> list[str]:
    return [path.relative_to(root).as_posix() for path in render(root, check)]


def test_everything_is_up_to_date() -> None:
    assert names(ROOT, check=True) == [], "run python tools/render_docs.py"


def test_every_section_is_shown_somewhere() -> None:
    shown = {name for path in documents(ROOT) for name in re.findall(r"figures:begin (\S+)", path.read_text())}
    assert shown == known().keys()


def test_a_changed_result_is_named_then_shown_on_pages_and_in_the_plot(copy: Path) -> None:
    pytest.importorskip("matplotlib")
    change(copy / SUITE, ["rows", 0, "us", "ours"], 123.456)
    before = (copy / "docs/decode-attention.md").read_text()
    plot = copy / "docs/images/decode-attention-bandwidth.png"
    differing = ["README.md", "docs/decode-attention.md", "docs/images/decode-attention-bandwidth.png"]
    assert names(copy, check=True) == differing
    assert (copy / "docs/decode-attention.md").read_text() == before
    old = plot.read_bytes()
    assert names(copy, check=False) == differing
    assert "**123.46**" in (copy / "docs/decode-attention.md").read_text()
    assert plot.read_bytes() != old
    assert names(copy, check=True) == names(copy, check=False) == []


@pytest.mark.parametrize(
    ("results", "keys", "value", "page", "shown"),
    [
        ("results/ops/h200.json", ["rows", 0, "us"], 4321.0, "docs/cuda-ops.md", "| 4321.0 ("),
        ("results/ops/h200.json", ["elementwise", 0, "us"], 4321.0, "docs/cuda-ops.md", "| 4321.0 ("),
        ("results/ops/h200.json", ["prefill_attention", 0, "us"], 4321, "docs/cuda-ops.md", "| 4321 ("),
        ("results/decode_step/development.json", ["rows", 1, "us_per_token"], 1.5, "docs/decode-step.md", "| 1.5 "),
        ("results/sampling/h200.json", ["reference", 0, "us"], 4321.0, "docs/sampling.md", "| 4321 "),
        ("models/demo/training.json", ["held_out_loss"], 4.321, "docs/demo-model.md", "| **4.321** "),
        ("results/decode_attn/ncu.json", ["rows", 0, "us"], 4321.0, "docs/decode-attention.md", "| 4321.00 "),
    ],
)
def test_each_set_of_results_has_its_page(
    copy: Path, results: str, keys: list[Any], value: object, page: str, shown: str
) -> None:
    change(copy / results, keys, value)
    assert names(copy, check=False) == [page]
    assert shown in (copy / page).read_text()


def test_whole_model_results_with_their_plots(copy: Path) -> None:
    pytest.importorskip("matplotlib")
    shutil.rmtree(copy / "results/model")
    engines = {"ours": 0.001, "vllm-default": 0.003, "vllm-inprocess": 0.002}
    make_record(engines, samplings=("mission", "greedy")).save(copy / "results/model/seed-1b.json")
    make_record(engines, suite="profile", samplings=("greedy",)).save(copy / "results/model/profile-1b.json")
    assert names(copy, check=False) == [
        *("README.md", "docs/benchmarks.md"),
        *("docs/images/seed-1b-h200-mission.png", "docs/images/seed-1b-h200-greedy.png"),
    ]
    readme = (copy / "README.md").read_text()
    assert "<!-- figures:begin model-summary -->\n\n### Batched inference: 1b on H200, temperature" in readme
    assert "| 1          | 128, 128            | 934.31            | 467.15          | 2.00x         |" in readme
    assert "(docs/images/seed-1b-h200-mission.png)" in readme
    page = copy / "docs/benchmarks.md"
    assert "| Custom speedup ratio     |     2.000   |      1.000  |" in page.read_text()
    page.write_text(page.read_text() + "<!-- figures:begin model-summary -->\n<!-- figures:end -->\n")
    assert names(copy, check=False) == ["docs/benchmarks.md"]
    assert "(images/seed-1b-h200-mission.png)" in page.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- figures:begin nothing -->\n<!-- figures:end -->\n",
            r"docs/new\.md: no section is called 'nothing'; there .* ops-",
        ),
        ("<!-- figures:begin demo-model -->\n", "docs/new.md: not every"),
        ("<!-- figures:end -->\n", "docs/new.md: not every"),
        (
            "<!-- figures:begin demo-model -->\n<!-- figures:begin ops-products -->\n<!-- figures:end -->\n",
            "no `<!-- fig",
        ),
    ],
)
def test_wrong_markers_are_errors_that_change_nothing(copy: Path, text: str, message: str) -> None:
    (copy / "docs/new.md").write_text(text)
    change(copy / SUITE, ["rows", 0, "us", "ours"], 123.456)
    with pytest.raises(ConfigError, match=message):
        render(copy, check=False)
    assert "123.46" not in (copy / "docs/decode-attention.md").read_text()


def test_missing_and_broken_results_are_named(copy: Path) -> None:
    (copy / SUITE).write_text("{")
    with pytest.raises(ConfigError, match=r"suite\.json: no results can be read"):
        render(copy, check=True)
    (copy / SUITE).unlink()
    with pytest.raises(ConfigError, match=r"suite\.json of results/decode_attn/\*\.json"):
        render(copy, check=True)


def test_the_command(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(render_docs, "ROOT", copy)
    change(copy / "results/sampling/h200.json", ["reference", 0, "us"], 4321.0)
    assert render_docs.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/sampling.md differs from the results\n"
    assert render_docs.main([]) == render_docs.main(["--check"]) == 0
    assert capsys.readouterr().out == "docs/sampling.md rewritten\n"
    (copy / SUITE).unlink()
    assert render_docs.main(["--check"]) == 2
    assert capsys.readouterr().err.startswith("render_docs.py: ")


def test_every_section_of_a_full_set_of_whole_model_results() -> None:
    seed, startup = make_record({"ours": 0.001}), make_record({})
    profile = make_record({"ours": 0.001}, suite="profile")
    seed.notes.append("time budget: something")
    startup.startup["ours"] = {"first": 9.0, "seconds": [5.0], "loads": [1.0], "median": 5.0}
    found = {"batch_size": 1, "context_len": 192, "steps": 100, "untraced_us_per_step": 640.0}
    startup.profiles.append(found | {"gpu_idle_fraction": 0.01, "host_waits": {}})
    made = sections([seed, profile, startup])
    assert NOTHING not in made.values()
    assert (
        "| 1b on H200 | 1     | 192     | 100          | 640.0               | 1.00%    | none       |"
        in made["model-idle"]
    )
    assert "- time budget: something" in made["model-conditions"] and "787 TFLOP/s" in made["model-conditions"]
    assert set(sections([]).values()) == {NOTHING}
    assert sections([profile])["model-summary"] == sections([profile])["model-figures"]


def test_one_suite_may_be_in_a_file_for_each_way_of_sampling() -> None:
    mission, greedy = (make_record({"ours": 0.001}, samplings=(name,)) for name in ("mission", "greedy"))
    made = sections([greedy, mission])
    assert made["model-summary"] == sections([mission])["model-summary"]
    assert sections([greedy])["model-summary"] != made["model-summary"]
    for part in ("model-figures", "model-conditions"):
        titles = [line for line in made[part].splitlines() if line.startswith("#")]
        assert titles == [f"#### 1b on H200, suite seed, {how}" for how in ("greedy", "temperature 0.6, top-p 0.9")]
    assert len(plots([greedy, mission])) == 2


def test_what_a_run_of_the_op_benchmark_does_not_measure_is_said_to_be_missing() -> None:
    row = {"model": "1b", "op": "o", "tokens": 64, "us": 4.0, "bytes": 8_000_000, "flops": 1}
    record = {"read_bandwidth": 4e12, "matrix_flops": 8e14, "rows": [row, row | {"op": "qkv", "tokens": 8}]}
    made = ops.sections(Results("results/ops/*.json", {"h200": record}))
    assert made["ops-elementwise"] == made["ops-prefill-attention"] == NOTHING
    assert made["ops-products"].splitlines()[2:] == [
        "| 1B o                    |           | 4.0 (50%) |",
        "| 1B qkv                  | 4.0 (50%) |           |",
    ]


# The log is a dated record and tells its figures itself.
PROSE = [path for path in documents(ROOT) if path.name != "log.md"]
MEASURED = re.compile(r"\d\s?(?:to \d[\d.]* )?(?:µs|us|ms|%|[MG]Hz|W|[GT]B/s|TFLOP/s|tok/s)(?![\w/])")


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_prose_leaves_measured_figures_to_sections(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", render_docs.SECTION.sub("", path.read_text()), flags=re.DOTALL)
    found = [" ".join(text[max(0, m.start() - 40) : m.end()].split()) for m in MEASURED.finditer(text)]
    assert found == [], "a figure that was measured belongs into a result file and a section that shows it"


@pytest.mark.parametrize("text", ["takes 3.5 µs", "97 %", "1 to 2 ms a step", "at 4.6 TB/s", "690 W"])
def test_what_counts_as_a_measured_figure(text: str) -> None:
    assert MEASURED.search(text)


@pytest.mark.parametrize("text", ["32 KB", "16 tokens", "top-p 0.9", "2 warps", "1 µsomething"])
def test_what_does_not(text: str) -> None:
    assert not MEASURED.search(text)
