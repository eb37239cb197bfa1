"""The commands as a person types them: what they print, their exit codes, and a conversation."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama3 import LLM, SamplingParams, UserError
from llama3.chat_command import Conversation, answer, handle_command
from llama3.cli import DEMO_MODEL, dashed_aliases

ROOT = DEMO_MODEL.parent.parent
SHORT = SamplingParams(temperature=0, max_tokens=8)


def command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_test_llama3_prints_what_is_loaded_what_was_written_and_how_long_it_took() -> None:
    result = command(
        "test_llama3.py", "--prompt", "import os\n", "--max-gen-len=12", "--temperature", "0", "--top_k", "5"
    )
    assert result.returncode == 0, result.stderr
    for line in (
        r"model:   .*models/demo \(3\.7 M parameters, torch\.bfloat16\)",
        r"device:  CPU; reference ops \(PyTorch\), because the device is a CPU",
        r"load:    \d+\.\d+ s",
        r"prefill: \d+\.\d+ s, \d+ tokens",
        r"decode:  \d+\.\d+ s, \d+ tokens in all",
        r"speed:   \d+\.\d+ tok/s",
        r"memory:  \d+ MiB peak on the host",
    ):
        assert re.search(rf"^{line}", result.stdout, re.MULTILINE), (line, result.stdout)
    assert "--- prompt ---\nimport os\n" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model_name", "./no-such-folder"), './no-such-folder": no such folder'),
        (("--max_model_len", "4"), "leaves no room to generate: the limit for prompt and answer together is 4"),
        (("--temperature", "-1"), "temperature is -1.0; it must be a number >= 0"),
        (("--device", "cuda"), "device 'cuda' is not available"),
        (("--kernels", "cuda"), "kernels='cuda' cannot run here: the device is a CPU"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = command("test_llama3.py", *arguments)
    assert result.returncode == 2
    assert result.stdout == "" or result.stdout.startswith("model:")
    *_, last = result.stderr.strip().splitlines()
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in result.stderr


def test_sampling_is_checked_before_a_model_is_looked_for() -> None:
    for script in (["test_llama3.py"], ["-m", "llama3", "generate", "x"]):
        result = command(*script, "--top_p", "7", "--model_name", "./no-such-folder")
        assert result.returncode == 2 and "top_p is 7.0" in result.stderr


def test_output_that_nobody_reads_any_more_is_no_error() -> None:
    code = "import sys; from llama3.cli import run_main; run_main(lambda argv: [print('é' * 999) for _ in range(999)])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(3) == b"???"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


SCRIPT = """
from llama3.cli import run_main
from llama3.errors import RequestError
def main(argv):
    print(1)
    if argv: raise RequestError("bad")
run_main(main)
"""


@pytest.mark.parametrize("stdout", [">&-", "| head -c 0"])
@pytest.mark.parametrize(("argument", "statuses"), [("", (0, 1)), ("x", (2,))])
def test_whatever_becomes_of_the_output_there_is_no_traceback(
    tmp_path: Path, stdout: str, argument: str, statuses: tuple[int, ...]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    line = f"{sys.executable} {tmp_path}/script.py {argument} {stdout}; exit $PIPESTATUS"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode in statuses and done.stderr == ("error: bad\n" if argument else "")


def test_generate_writes_only_the_text_to_standard_output() -> None:
    result = command("-m", "llama3", "generate", "import os\n", "--temperature=0", "--max_gen_len=8")
    assert result.returncode == 0, result.stderr
    with LLM(DEMO_MODEL, device="cpu", use_tqdm=False) as llm:
        expected = llm.generate("import os\n", SHORT, use_tqdm=False)[0].outputs[0].text
    assert result.stdout == expected + "\n"
    assert re.search(r"\d+ tokens, \d+\.\d tok/s", result.stderr)


def test_a_conversation_by_pipe() -> None:
    lines = "Write a function named add\n/system Answer briefly.\n/reset\n/help\n\nhello\n/exit\n"
    result = command("-m", "llama3", "chat", "--temperature", "0", "--max-gen-len", "12", stdin=lines)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") >= 7
    for reply in ("system message set", "the conversation is forgotten", "/reset forgets the conversation"):
        assert reply in result.stderr


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DEMO_MODEL, device="cpu", dtype="float32", max_model_len=256, use_tqdm=False)


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(llm: LLM) -> None:
    conversation, written = Conversation(), []

    def write(piece: str) -> None:
        written.append(piece)
        if len(written) == 3:
            raise KeyboardInterrupt

    answer(llm, conversation, "Write a function named add", SamplingParams(temperature=0, max_tokens=50), write)
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[1]["content"] == "".join(written[:3])
    assert written[-1] == " [stopped]"
    answer(llm, conversation, "and another", SHORT, written.append)
    assert len(conversation.turns) == 4


def test_a_turn_that_does_not_fit_leaves_no_trace(llm: LLM) -> None:
    conversation = Conversation(system="Be brief.")
    with pytest.raises(UserError, match="leaves no room to generate"):
        answer(llm, conversation, "word " * 400, SHORT, print)
    assert conversation.turns == []
    assert [m["role"] for m in conversation.messages] == ["system"]


def test_commands_of_a_conversation() -> None:
    conversation = Conversation(turns=[{"role": "user", "content": "x"}])
    assert "set" in (handle_command(conversation, "/system Be terse.") or "")
    assert conversation.messages == [{"role": "system", "content": "Be terse."}]
    assert "removed" in (handle_command(conversation, "/system") or "")
    assert conversation.messages == []
    assert "/reset" in (handle_command(conversation, "/nonsense") or "")
    assert handle_command(conversation, "/exit") is None


def test_flags_take_dashes_and_underscores_and_values_are_left_alone() -> None:
    given = ["--max-gen-len=5", "--model_name", "a-b/c-d", "x-y", "--top-p", "0.9", "--", "--kept-as-is"]
    assert dashed_aliases(given) == [
        "--max_gen_len=5", "--model_name", "a-b/c-d", "x-y", "--top_p", "0.9", "--", "--kept-as-is",
    ]  # fmt: skip
    texts = ["-- re-index the user-table", "---\ntitle: my-page\n", "--", "-- x-y"]
    assert dashed_aliases(texts) == texts


@pytest.mark.parametrize("script", ["test_llama3.py"])
def test_help_names_every_flag(script: str) -> None:
    result = command(script, "--help")
    for flag in ("model_name", "prompt", "max_gen_len", "temperature", "top_p", "top_k", "seed", "dtype", "device",
                 "kernels", "max_model_len"):  # fmt: skip
        assert f"--{flag}" in result.stdout


def test_the_repository_holds_the_demo_model() -> None:
    size = sum(file.stat().st_size for file in Path(DEMO_MODEL).iterdir())
    assert size <= 8 * 10**6
