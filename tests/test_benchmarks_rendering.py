"""The documents show what the result files hold."""

import re
from pathlib import Path

import pytest

from benchmarks.sections import NOTHING, sections
from llama3.errors import ConfigError
from tests.benchmark_records import make_record
from tools.render_results import ROOT, documents, render

pytest.importorskip("matplotlib")


@pytest.fixture
def repository(tmp_path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "# Title\n<!-- results:begin model-summary -->\nold\n<!-- results:end -->\nafter\n"
    )
    (tmp_path / "docs" / "b.md").write_text("<!-- results:begin model-profile -->\n<!-- results:end -->\n")
    (tmp_path / "docs" / "plain.md").write_text("no section\n")
    results = tmp_path / "results" / "model"
    engines = {"ours": 0.001, "vllm-default": 0.003, "vllm-inprocess": 0.002}
    make_record(engines, samplings=("mission", "greedy")).save(results / "seed-1b.json")
    make_record(engines, suite="profile", samplings=("greedy",)).save(results / "profile-1b.json")
    return tmp_path


def test_documents_and_plots_are_made_once_and_then_up_to_date(repository):
    changed = {path.relative_to(repository).as_posix() for path in render(repository, check=False)}
    images = {"docs/images/seed-1b-mission.png", "docs/images/seed-1b-greedy.png"}
    assert changed == {"README.md", "docs/b.md"} | images
    readme = (repository / "README.md").read_text()
    assert readme.startswith("# Title\n<!-- results:begin model-summary -->\n\n### Batched inference: 1b, temperature")
    assert readme.endswith("<!-- results:end -->\nafter\n") and "old" not in readme and "greedy" not in readme
    assert "| 1          | 128, 128            | 934.31            | 467.15          | 2.00x         |" in readme
    assert "(docs/images/seed-1b-mission.png)" in readme
    assert "| Custom speedup ratio     |     2.000   |      1.000  |" in (repository / "docs" / "b.md").read_text()
    assert render(repository, check=True) == render(repository, check=False) == []


def test_a_check_names_what_differs_and_changes_nothing(repository):
    render(repository, check=False)
    make_record({"ours": 0.0005}).save(repository / "results" / "model" / "seed-1b.json")
    before = (repository / "README.md").read_text()
    stale = [path.name for path in render(repository, check=True)]
    assert stale == ["README.md", "seed-1b-mission.png"]
    assert (repository / "README.md").read_text() == before


def test_a_section_that_nobody_knows_is_an_error(repository):
    (repository / "docs" / "plain.md").write_text("<!-- results:begin nonsense -->\n<!-- results:end -->\n")
    with pytest.raises(ConfigError, match=r"plain\.md: no section is called 'nonsense'"):
        render(repository, check=True)


def test_every_section_of_a_full_set_of_results():
    seed, profile, startup = (
        make_record({"ours": 0.001}),
        make_record({"ours": 0.001}, suite="profile"),
        make_record({}),
    )
    seed.notes.append("time budget: something")
    startup.startup["ours"] = {"first": 9.0, "seconds": [5.0], "loads": [1.0], "median": 5.0}
    found = {"batch_size": 1, "context_len": 192, "steps": 100, "untraced_us_per_step": 640.0}
    startup.profiles.append(found | {"gpu_idle_fraction": 0.01, "host_waits": {}})
    made = sections([seed, profile, startup], "images")
    assert NOTHING not in made.values()
    assert (
        "| 1b    | 1     | 192     | 100          | 640.0               | 1.00%    | none       |" in made["model-idle"]
    )
    assert "- time budget: something" in made["model-conditions"] and "787 TFLOP/s" in made["model-conditions"]
    assert set(sections([], "images").values()) == {NOTHING}


def test_the_documents_of_this_repository_are_up_to_date():
    assert [path.name for path in render(ROOT, check=True)] == []
    names = [n for path in documents(ROOT) for n in re.findall(r"results:begin (\S+)", path.read_text())]
    assert "model-throughput" in names
