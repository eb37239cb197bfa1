"""The bundled model: whole, small, described as it is, and trained: it predicts Python that it never saw."""

import ast
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from llama3.config import ModelConfig, RopeScaling
from llama3.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "models" / "demo"
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def tools() -> Iterator[Any]:
    """The tools' modules, which import each other by their plain names."""
    sys.path.insert(0, str(TOOLS))
    import demo_corpus
    import train_demo_model

    yield {"corpus": demo_corpus, "train": train_demo_model}
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((DEMO / "training.json").read_text())


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def test_the_folder_is_small_and_its_files_are_those_of_the_record(tools: Any, record: dict[str, Any]) -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 8_000_000
    assert tools["train"].file_hashes(DEMO) == record["sha256"]


def test_it_is_a_llama_3_2(tokenizer: Tokenizer) -> None:
    config = ModelConfig.from_folder(DEMO)
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert (config.head_dim, config.num_heads, config.num_kv_heads) == (64, 4, 2)
    assert (config.rope_theta, config.max_position_embeddings, config.rms_norm_eps) == (500000.0, 131072, 1e-5)
    assert config.tie_word_embeddings
    assert config.dtype == torch.bfloat16
    generation = json.loads((DEMO / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == config.eos_token_ids == tokenizer.stop_ids
    assert generation["bos_token_id"] == config.bos_token_id == tokenizer.bos_token_id == config.vocab_size - 16


def held_out_loss(tools: Any, model: Any, tokenizer: Tokenizer, shuffled: bool = False) -> float:
    """Mean nats a token on 8,192 tokens of this interpreter's held-out files."""
    corpus = tools["corpus"]
    files = [file for file in corpus.read_library(corpus.standard_library()) if file.split == "held_out"]
    ids = torch.tensor([i for file in files for i in tokenizer.encode(file.text)][:8192])
    if shuffled:
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    return tools["train"].mean_loss(model, ids, 1024)


def test_it_predicts_files_that_it_never_saw(
    tools: Any, model: Any, tokenizer: Tokenizer, record: dict[str, Any]
) -> None:
    perplexity = math.exp(held_out_loss(tools, model, tokenizer))
    # Another version of Python has other files, so only near the recorded figure.
    assert perplexity < 1.6 * record["held_out_perplexity"]
    assert math.exp(held_out_loss(tools, model, tokenizer, shuffled=True)) > 20 * perplexity


PAD = 2036


def complete(model: Any, ids: list[int], max_new_tokens: int, **options: Any) -> list[list[int]]:
    """The new tokens of every answer, sampled as the folder's generation_config says unless `options` differ."""
    torch.manual_seed(0)
    inputs = torch.tensor([ids])
    mask = torch.ones_like(inputs)
    out = model.generate(inputs, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=PAD, **options)
    return [[token for token in row if token != PAD] for row in out[:, len(ids) :].tolist()]


def test_completions_are_python(model: Any, tokenizer: Tokenizer) -> None:
    prompt = "def fibonacci(n):\n"
    (new,) = complete(model, tokenizer.encode(prompt), 200, do_sample=False, temperature=None, top_p=None)
    assert new[-1] in tokenizer.stop_ids
    function = ast.parse(prompt + tokenizer.decode(new)).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert ast.get_docstring(function)


def test_a_question_is_answered_with_a_function_and_ends(model: Any, tokenizer: Tokenizer) -> None:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Write a function named flatten."}])
    ids = tokenizer.encode(text, add_special_tokens=False)
    answers = complete(model, ids, 200, num_return_sequences=4)
    assert all(tokenizer.decode(answer).startswith("def flatten(") for answer in answers)
    assert any(answer[-1] == 2041 for answer in answers)


def test_training_runs_from_start_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "train_demo_model.py"), "--quick", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 4
    assert math.isfinite(record["held_out_loss"])
    assert record["sha256"].keys() | {"training.json"} == {path.name for path in tmp_path.iterdir()}
    assert ModelConfig.from_folder(tmp_path).num_layers == 1
    text = "def f(x):\n    return 'é'"
    assert Tokenizer.from_folder(tmp_path).encode(text) == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    assert "<|begin_of_text|>def fibonacci(n):" in done.stdout


def test_the_split_depends_on_the_name_alone(tools: Any) -> None:
    source = tools["corpus"].SourceFile
    assert {source("argparse.py", text).split for text in ("", "a")} == {"held_out"}
    assert source("dis.py", "").split == "validation"
    assert source("os.py", "").split == "train"


def test_the_library_is_read_once_and_without_tests(tools: Any, tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "test/t.py", "p/tests/t.py", "site-packages/s.py", "_sysconfigdata_x.py", "p/q.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n" if name in ("a.py", "b.py") else f"name = {name!r}\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    assert [file.name for file in tools["corpus"].read_library(tmp_path)] == ["a.py", "p/q.py"]


def test_snippets_become_questions_and_answers(tools: Any) -> None:
    corpus = tools["corpus"]
    text = 'class A:\n    def f(self, x=1):\n        """Add one."""\n        return x + 1\n\ndef short(): pass\n'
    found = {snippet.name: snippet for snippet in corpus.snippets(corpus.SourceFile("a.py", text))}
    assert found.keys() == {"A", "f"}
    assert found["f"].source == 'def f(self, x=1):\n    """Add one."""\n    return x + 1'
    assert (found["f"].signature, found["f"].summary) == ("f(self, x=1)", "Add one.")
    alone, chats = corpus.snippets_and_conversations([corpus.SourceFile("a.py", text)], random.Random(0))
    answers = [message["content"] for chat in chats for message in chat if message["role"] == "assistant"]
    assert sorted([*answers, *(one.removesuffix("\n") for one in alone)]) == sorted(s.source for s in found.values())
