"""Ids, text and rendered chats equal those of transformers' AutoTokenizer on the same folder; bad input is named."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama3.errors import RequestError, TokenizerError
from llama3.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent / "models" / "demo"
EXAMPLES = settings(max_examples=1000, deadline=None, derandomize=True)
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")

SPECIALS = [
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|python_tag|>",
    "<|eot",
    "|>",
]
AWKWARD = [
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "👍🏽",
    "漢字仮名",
    "한국어",
    "ا\u064bلعربية",
    "e\u0301\u0327",
    "\u200b\ufeff",
    "ﬁ",
    "İı",
    "\ufffd",
    "𝔘",
    "'S",
    "I'll",
]
pieces = st.one_of(
    st.sampled_from(SPECIALS),
    st.sampled_from(AWKWARD),
    st.text(alphabet=" \t\n\r\u00a0\u3000\x0b", max_size=8),
    st.text(alphabet="0123456789.,٣", max_size=9),
    st.text(alphabet=[chr(c) for c in (*range(32), *range(127, 160))], max_size=4),
    st.sampled_from(["def f(x):\n    return x", "import os\r\n", "self.", "Straße ", "#!/usr/bin/env python\n"]),
    st.text(max_size=12),
)
texts = st.lists(pieces, max_size=8).map("".join)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo folder without its weights, to break."""
    for name in FILES:
        shutil.copy(DEMO / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@EXAMPLES
@given(text=texts)
def test_ids_and_text_equal_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # texts that write begin-of-text themselves
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.encode_batch([text, "x"]) == [ids, theirs("x").input_ids]
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@EXAMPLES
@given(ids=st.lists(st.integers(0, 2047), max_size=40), skip=st.booleans())
def test_any_ids_decode_as_in_transformers(ours: Tokenizer, theirs: Any, ids: list[int], skip: bool) -> None:
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_token_bytes_are_the_tokens_text(ours: Tokenizer) -> None:
    assert all(ours.token_bytes(i).decode(errors="replace") == ours.decode([i], False) for i in range(2048))
    assert ours.token_bytes(5000) == b""


@EXAMPLES
@given(contents=st.lists(texts, min_size=1, max_size=4), system=st.none() | texts, add_generation_prompt=st.booleans())
def test_chats_equal_transformers(
    ours: Tokenizer, theirs: Any, contents: list[str], system: str | None, add_generation_prompt: bool
) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    text = ours.apply_chat_template(messages, add_generation_prompt)
    assert text == theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    ids = ours.encode(text, add_special_tokens=False)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
    assert ids == expected
    assert ids[0] == ours.bos_token_id != ids[1]


@EXAMPLES
@given(content=texts.filter(str.strip), trims=st.booleans())
def test_a_message_to_be_continued_equals_transformers(ours: Tokenizer, theirs: Any, content: str, trims: bool) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    trimming = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    how = {"continue_final_message": True, "add_generation_prompt": False}
    how |= {"chat_template": trimming} if trims else {}
    assert ours.apply_chat_template(messages, **how) == theirs.apply_chat_template(messages, tokenize=False, **how)


def test_what_cannot_be_continued_is_named(ours: Tokenizer) -> None:
    question: list[dict] = [{"role": "user", "content": "a"}]
    with pytest.raises(RequestError, match="goes with add_generation_prompt=False"):
        ours.apply_chat_template(question, continue_final_message=True)
    call = [*question, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    with pytest.raises(RequestError, match="the last message has no text"):
        ours.apply_chat_template(call, add_generation_prompt=False, continue_final_message=True)
    content = "{{ messages[0].content }}"
    for template in ("x", content * 2, "{{ messages[0].content | upper }}", "{{ messages[0].content[1:] }}"):
        with pytest.raises(TokenizerError, match="leaves out, changes or repeats the last message"):
            ours.apply_chat_template(question, False, chat_template=template, continue_final_message=True)


TEMPLATES = {
    "blanks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "tools as JSON": "{{ tools | tojson }}|{{ tools | tojson(indent=4) }}|{{ documents|tojson }}{{ messages|tojson }}",
    "date": "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}",
    "today": "{{ strftime_now('%d %b %Y') }}{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% set a = 1 %}{% generation %}{% set a = 2 %}\n {{ a }}{{ messages[0] }}{% endgeneration %}{{ a }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "absent keys": "{% for m in messages %}{{ 'tool_calls' in m }}{{ m.name is defined }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("variables", [{}, {"date_string": "1 < 2 & é"}], ids=["plain", "date_string"])
def test_the_sandbox_renders_as_transformers(ours: Tokenizer, theirs: Any, name: str, variables: dict) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "a<b> & 'c' ü", "parameters": {}}}]
    messages = [
        {"role": "user", "content": "1 < 2 & <b>", "name": None},
        {"role": "assistant", "content": "ü'\"", "tool_calls": None},
    ]
    options = {"tools": tools, "documents": [{"title": "t", "text": "<x>"}], "chat_template": TEMPLATES[name]}
    got = ours.apply_chat_template(messages, **options, **variables)
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options, **variables)
    assert got == expected


def test_a_folder_saved_again_by_transformers_is_the_same(theirs: Any, ours: Tokenizer, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    again = Tokenizer.from_folder(tmp_path)
    messages = [{"role": "user", "content": "a"}]
    assert again.apply_chat_template(messages) == ours.apply_chat_template(messages)
    assert again.encode("a<|eot_id|>b") == ours.encode("a<|eot_id|>b")


def test_the_jinja_file_comes_before_the_config_and_tools_have_their_own(folder: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    edit(folder / "tokenizer_config.json", chat_template=templates)
    messages = [{"role": "user", "content": "a"}]
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template(messages) == "plain"
    assert tokenizer.apply_chat_template(messages, tools=[]) == "tools"
    assert tokenizer.apply_chat_template(messages, chat_template="tool_use") == "tools"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(folder).apply_chat_template(messages) == "file"
    assert Tokenizer.from_folder(folder).apply_chat_template(messages, tools=[]) == "file"  # it replaces all others
    edit(folder / "tokenizer_config.json", chat_template=templates[1:])
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TokenizerError, match="has no default chat template: name one of tool_use"):
        Tokenizer.from_folder(folder).apply_chat_template(messages)


def test_named_templates_as_transformers_saves_them(folder: Path, tmp_path: Path) -> None:
    templates = [{"name": name, "template": f"{name} {{{{ tools }}}}"} for name in ("default", "tool_use", "rag")]
    edit(folder / "tokenizer_config.json", chat_template=templates)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "additional_chat_templates").is_dir()
    ours, messages = Tokenizer.from_folder(tmp_path / "saved"), [{"role": "user", "content": "a"}]
    for how in ({}, {"tools": [{"type": "function"}]}, {"chat_template": "rag"}):
        assert ours.apply_chat_template(messages, **how) == theirs.apply_chat_template(messages, tokenize=False, **how)


END_OF_TEXT, EOM, EOT = 2033, 2040, 2041


@pytest.mark.parametrize(
    ("generation_config", "config", "named", "more"),
    [
        ([END_OF_TEXT, EOM, EOT], [EOT], "<|eot_id|>", set()),
        (7, None, "<|end_of_text|>", {7}),
        (None, 8, None, {8}),
        ([5, 6], [8], "<|reserved_special_token_3|>", {5, 6, 8, 2043}),
    ],
)
def test_stop_ids_are_the_union_of_all_sources(
    folder: Path, generation_config: Any, config: Any, named: str | None, more: set[int]
) -> None:
    edit(folder / "generation_config.json", eos_token_id=generation_config)
    edit(folder / "config.json", eos_token_id=config)
    edit(folder / "tokenizer_config.json", eos_token=named)
    (folder / "special_tokens_map.json").unlink()
    assert Tokenizer.from_folder(folder).stop_ids == {END_OF_TEXT, EOM, EOT} | more


def test_tokenizer_json_alone_is_enough(folder: Path) -> None:
    for name in FILES[1:]:
        (folder / name).unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.stop_ids == {END_OF_TEXT, EOM, EOT}
    assert tokenizer.encode("a") == [2032, *tokenizer.encode("a", add_special_tokens=False)]


def test_special_tokens_may_be_objects(folder: Path) -> None:
    edit(
        folder / "tokenizer_config.json",
        bos_token={"content": "<|eom_id|>", "lstrip": False},
        chat_template="{{ bos_token }}",
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos_token_id == EOM
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}]) == "<|eom_id|>"


def test_truncation_left_in_the_file_is_ignored(folder: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 50},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
    }
    edit(folder / "tokenizer.json", truncation=truncation, padding={**padding, "pad_token": "!"})
    assert len(Tokenizer.from_folder(folder).encode("1 2 3 4 5 6 7 8")) == 16


def test_two_begin_tokens_warn_once(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode("a")
        tokenizer.encode("<|begin_of_text|>a", add_special_tokens=False)
    with pytest.warns(UserWarning, match="two begin-of-text tokens.*add_special_tokens=False") as caught:
        tokenizer.encode("<|begin_of_text|>a")
        tokenizer.encode("<|begin_of_text|>b")
    assert len(caught) == 1


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:5000])


def make_sentencepiece(folder: Path) -> None:
    edit(folder / "tokenizer.json", decoder={"type": "Fuse"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tokenizer, "tokenizer.json: no such file"),
        (cut_tokenizer, "tokenizer.json: not a valid tokenizer file"),
        (make_sentencepiece, "tokenizer.json: not a byte-level BPE"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: not valid JSON at line 1"),
        (
            lambda f: edit(f / "config.json", vocab_size=2040),
            "has token id 2047, but the model's vocabulary ends at 2039",
        ),
        (
            lambda f: edit(f / "tokenizer_config.json", eos_token="</s>"),
            "has no token '</s>', which .* names eos_token",
        ),
        (lambda f: edit(f / "generation_config.json", eos_token_id=["x"]), r"eos_token_id is \['x'\]; a token id or"),
        (lambda f: edit(f / "tokenizer_config.json", chat_template=[1]), "chat_template must be a string or a list"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja: cannot be read"),
    ],
)
def test_a_damaged_folder_is_named(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_template_the_error_says_what_to_do(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=None)
    messages = [{"role": "user", "content": "a"}]
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(TokenizerError, match=r"has no chat template .*use generate, or pass chat_template"):
        tokenizer.apply_chat_template(messages)
    assert tokenizer.apply_chat_template(messages, chat_template="{{ messages[0].content }}") == "a"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "the chat template is broken at line 1"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "fails on these messages"),
        ("{{ 1 / 0 }}", "fails on these messages: ZeroDivisionError"),
        ("{{ '{x}'.format() }}", "fails on these messages: KeyError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on these messages: RecursionError"),
        ("{{ messages[0].content.a.b }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
    ],
)
def test_a_template_that_fails_is_named(ours: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        ours.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hi", "messages must be a list .* not str"),
        ({"role": "user", "content": "a"}, "messages must be a list .* not dict"),
        (None, "messages must be a list .* not NoneType"),
        (["hi"], "message 0 must be .* not str"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 1 has role None"),
        ([{"role": "user"}], r"message 0 \(user\) has content None; it must be a string"),
        ([{"role": "user", "content": ["a"]}], r"message 0 \(user\) has content \['a'\]; it must be a string"),
    ],
)
def test_malformed_messages_are_named(ours: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=re.compile(message)):
        ours.apply_chat_template(messages)


def test_tools_must_be_schemas(ours: Tokenizer) -> None:
    with pytest.raises(RequestError, match="tools must be JSON schemas"):
        ours.apply_chat_template([{"role": "user", "content": "a"}], tools=[len])


def test_a_lone_surrogate_is_named(ours: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"lone surrogate, '\\ud800', at character 2"):
        ours.encode("ab\ud800")
