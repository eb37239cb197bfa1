"""The pages on decode attention show what the result files say."""

from __future__ import annotations

import json

import pytest

from tools import render_docs


def test_the_pages_are_up_to_date():
    texts = [path.read_text() for path in render_docs.DOCUMENTS]
    assert [render_docs.render(text) for text in texts] == texts
    assert render_docs.FIGURE.is_file()
    assert {name for text in texts for _, name, _ in render_docs.SECTION.findall(text)} == set(render_docs.SECTIONS)


def test_a_changed_result_changes_the_page(tmp_path, monkeypatch):
    for path in render_docs.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    document = json.loads((tmp_path / "suite.json").read_text())
    document["rows"][0]["us"]["ours"] = 123.456
    (tmp_path / "suite.json").write_text(json.dumps(document))
    monkeypatch.setattr(render_docs, "RESULTS", tmp_path)
    assert "**123.46**" in render_docs.render(render_docs.DOCUMENTS[0].read_text())


def test_an_unknown_section_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        render_docs.render("<!-- decode_attn:begin nothing -->\n<!-- decode_attn:end -->")
