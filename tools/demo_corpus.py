"""What the demo model reads: the source of Python's standard library, split by file, and chat samples made from it.

The split depends on the file's name only, so that a file stays held out whatever version of Python is installed.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__phello__"}
MAX_FILE_BYTES = 400_000
HELD_OUT_PERCENT = 4  # reported once, at the end
VALIDATION_PERCENT = 3  # picks the checkpoint
SNIPPET_LINES = range(3, 61)


@dataclass(frozen=True)
class SourceFile:
    """One file of the library: its path relative to the library's folder, and its text."""

    name: str
    text: str

    @property
    def split(self) -> str:
        """``"train"``, ``"validation"`` or ``"held_out"``."""
        bucket = int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100
        if bucket < HELD_OUT_PERCENT:
            return "held_out"
        return "validation" if bucket < HELD_OUT_PERCENT + VALIDATION_PERCENT else "train"


def standard_library() -> Path:
    """The folder of the running interpreter's own library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_library(folder: Path) -> list[SourceFile]:
    """Every distinct, readable ``.py`` file under ``folder`` in name order, without tests and machine-made tables."""
    files, seen = [], set()
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        # _sysconfigdata and config-* describe the machine that built this interpreter.
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        if relative.parts[0].startswith("config-") or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8").strip() + "\n"
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) > 1 and digest not in seen:
            seen.add(digest)
            files.append(SourceFile(relative.as_posix(), text))
    return files


def corpus_sha256(files: list[SourceFile]) -> str:
    """One hash over names and texts: two runs with the same hash read the same library."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: Path(file.name)):
        total.update(f"{file.name}\0{file.text}\0".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Snippet:
    """One function or class cut out of a file: its source without the outer indentation."""

    kind: str  # "function" or "class"
    name: str
    signature: str
    summary: str  # the docstring's first line, or ""
    source: str


def snippets(file: SourceFile) -> list[Snippet]:
    """The functions, methods and classes of a file that are short enough to be an answer."""
    try:
        tree = ast.parse(file.text)
    except SyntaxError:  # lib2to3 keeps Python 2 grammar examples
        return []
    lines = file.text.splitlines()
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.end_lineno is None:
            continue
        if node.end_lineno - node.lineno + 1 not in SNIPPET_LINES or "\t" in lines[node.lineno - 1]:
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        summary = (ast.get_docstring(node) or "").split("\n")[0].strip()
        if isinstance(node, ast.ClassDef):
            found.append(Snippet("class", node.name, node.name, summary, source))
        else:
            found.append(Snippet("function", node.name, f"{node.name}({ast.unparse(node.args)})", summary, source))
    return found


def question(snippet: Snippet, rng: random.Random) -> str:
    """One of several ways in which a user may ask for this snippet."""
    kind, name, signature = snippet.kind, snippet.name, snippet.signature
    ways = [
        f"Write a {kind} named {name}.",
        f"Write a Python {kind} `{signature}`.",
        f"Write a {kind} {name} in Python",
        f"{name}",
        f"Please show me the {kind} {signature}.",
    ]
    if snippet.summary:
        ways += [
            f"Write a {kind} named {name}: {snippet.summary}",
            f"Write a {kind} for this: {snippet.summary}",
            f"Write a Python {kind} with the docstring: {snippet.summary}",
            snippet.summary,
        ]
    return rng.choice(ways)


SYSTEM_PROMPTS = [
    "You write Python.",
    "You are a helpful assistant.",
    "You are a helpful assistant that writes Python code.",
    "Answer with Python code only.",
]


def conversation(picked: list[Snippet], rng: random.Random) -> list[dict[str, str]]:
    """Chat messages: perhaps a system prompt, then one question and its answer for each snippet."""
    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for snippet in picked:
        messages.append({"role": "user", "content": question(snippet, rng)})
        messages.append({"role": "assistant", "content": snippet.source})
    return messages


def snippets_and_conversations(
    files: list[SourceFile], rng: random.Random
) -> tuple[list[str], list[list[dict[str, str]]]]:
    """Every snippet once: one in three as a text of its own, the others as answers in chats of one to three turns."""
    pool = [snippet for file in files for snippet in snippets(file)]
    rng.shuffle(pool)
    num_alone = len(pool) // 3
    alone, rest = [snippet.source + "\n" for snippet in pool[:num_alone]], pool[num_alone:]
    chats = []
    while rest:
        turns = rng.choice([1, 1, 2, 3])
        chats.append(conversation(rest[:turns], rng))
        rest = rest[turns:]
    return alone, chats
