"""The record of what was seen on a GPU: outcomes are counted, and the hash follows the sources."""

from pathlib import Path

from tools.gpu_checks import SOURCES, count_by_file, source_digest


def test_outcomes_are_counted_by_file(tmp_path: Path) -> None:
    xml = tmp_path / "tests.xml"
    xml.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.test_b" name="fine"/>'
        '<testcase classname="tests.test_b" name="bad"><failure message="x"/></testcase>'
        '<testcase classname="tests.test_b" name="broken"><error message="x"/></testcase>'
        '<testcase classname="tests.test_a" name="left out"><skipped message="x"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert count_by_file(xml) == {
        "tests/test_a.py": {"passed": 0, "failed": 0, "skipped": 1},
        "tests/test_b.py": {"passed": 1, "failed": 2, "skipped": 0},
    }


def test_digest_follows_contents_and_names_and_nothing_else(tmp_path: Path) -> None:
    for name in SOURCES:
        path = tmp_path / name
        if path.suffix:
            path.write_text("1")
        else:
            path.mkdir()
            (path / "a.py").write_text("1")
    before = source_digest(tmp_path)
    (tmp_path / "README.md").write_text("more")
    (tmp_path / "llama3" / "__pycache__").mkdir()
    (tmp_path / "llama3" / "__pycache__" / "a.pyc").write_text("more")
    assert source_digest(tmp_path) == before
    (tmp_path / "llama3" / "a.py").write_text("2")
    changed = source_digest(tmp_path)
    assert changed != before
    (tmp_path / "llama3" / "a.py").rename(tmp_path / "llama3" / "b.py")
    assert source_digest(tmp_path) not in (before, changed)
