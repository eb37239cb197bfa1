"""Jobs of unequal lengths: as many tokens as of equal ones, and the table of both."""

import json
from pathlib import Path
from statistics import fmean

from benchmarks import ragged


def test_both_jobs_ask_for_as_many_tokens() -> None:
    jobs = ragged.jobs(num_prompts=2000, input_len=100, output_len=150, vocab_size=500, seed=3)
    equal, drawn = jobs["equal"], jobs["ragged"]
    assert set(equal.lengths) == {150} and {len(prompt) for prompt in equal.prompts} == {100}
    assert abs(fmean(drawn.lengths) - 150) < 0.5 and abs(fmean(map(len, drawn.prompts)) - 100) < 3
    assert min(drawn.lengths) < 50 and 400 < max(drawn.lengths) <= 4 * 150
    assert max(map(max, drawn.prompts)) == 499
    again = ragged.jobs(num_prompts=2000, input_len=100, output_len=150, vocab_size=500, seed=3)
    assert again == jobs


def test_a_small_model_runs_both(tmp_path: Path, capsys) -> None:
    out = tmp_path / "r" / "ragged.json"
    sizes = "--prompts 6 --input_len 5 --output_len 4 --rows 4 2 --repeats 1"
    assert ragged.main([*f"--shape tiny --device cpu {sizes} --json".split(), str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["rows"], row["job"]) for row in rows] == [(4, "equal"), (4, "ragged"), (2, "equal"), (2, "ragged")]
    wanted = ragged.jobs(6, 5, 4, 1000, seed=0)
    assert [row["runs"][0]["tokens"] for row in rows[:2]] == [24, sum(wanted["ragged"].lengths)]
    assert "6 x 5/4" in capsys.readouterr().out


def test_the_table_compares_them() -> None:
    row = {"shape": "8b", "rows": 256, "prompts": 9, "input_len": 100, "output_len": 150}
    text = ragged.table([row | {"job": "equal", "tok_s": 20000.0}, row | {"job": "ragged", "tok_s": 18000.0}])
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == ["8B", "9 x 100/150", "256", "20000", "18000", "0.900"]


def test_an_unknown_shape_is_an_error(capsys) -> None:
    assert ragged.main(["--shape", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
