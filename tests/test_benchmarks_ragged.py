"""Jobs of unequal lengths: as many tokens as of equal ones, answers that stop, and the table of all."""

import json
from pathlib import Path
from statistics import fmean

from benchmarks import ragged


def test_the_jobs_ask_for_as_many_tokens() -> None:
    jobs = ragged.jobs(num_prompts=2000, input_len=100, output_len=150, vocab_size=500, seed=3)
    equal, drawn, stopping = jobs.values()
    assert set(equal.lengths) == {150} and {len(prompt) for prompt in equal.prompts} == {100}
    assert abs(fmean(drawn.lengths) - 150) < 0.5 and abs(fmean(map(len, drawn.prompts)) - 100) < 3
    assert min(drawn.lengths) < 50 and 400 < max(drawn.lengths) <= 4 * 150
    assert max(map(max, drawn.prompts)) == 499
    assert stopping.prompts == drawn.prompts and stopping.stop_ids == [0, 150, 300, 450]
    assert not equal.stop_ids and not drawn.stop_ids
    again = ragged.jobs(num_prompts=2000, input_len=100, output_len=150, vocab_size=500, seed=3)
    assert again == jobs


def test_a_small_model_runs_them(tmp_path: Path, capsys) -> None:
    out = tmp_path / "r" / "ragged.json"
    sizes = "--prompts 6 --input_len 5 --output_len 4 --rows 4 2 --repeats 1"
    assert ragged.main([*f"--shape tiny --device cpu {sizes} --json".split(), str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    names = ("equal", "ragged", "stopping")
    assert [(row["rows"], row["job"]) for row in rows] == [(n, name) for n in (4, 2) for name in names]
    wanted = ragged.jobs(6, 5, 4, 1000, seed=0)
    tokens = [row["runs"][0]["tokens"] for row in rows[:3]]
    assert tokens[:2] == [24, sum(wanted["ragged"].lengths)] and 6 <= tokens[2] < 6 * 16
    assert "6 x 5/4" in capsys.readouterr().out


def test_the_table_compares_them() -> None:
    row = {"shape": "8b", "rows": 256, "prompts": 9, "input_len": 100, "output_len": 150}
    rates = {"equal": 20000.0, "ragged": 18000.0, "stopping": 17000.0}
    text = ragged.table([row | {"job": name, "tok_s": rate} for name, rate in rates.items()])
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == ["8B", "9 x 100/150", "256", "20000", "18000", "0.900", "17000", "0.850"]
    (first,) = [line for line in ragged.table([row | {"job": "equal", "tok_s": 20000.0}]).splitlines() if "8B" in line]
    assert first.count("20000") == 1 and "0.9" not in first


def test_an_unknown_shape_is_an_error(capsys) -> None:
    assert ragged.main(["--shape", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
