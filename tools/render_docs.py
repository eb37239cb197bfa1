"""Rewrite the measured figures and plots in README.md and docs/ from the result files.

    python tools/render_docs.py            rewrite what differs
    python tools/render_docs.py --check    change nothing; name every file that differs, exit with 1 if there is one

A section lies between `<!-- figures:begin NAME -->` and `<!-- figures:end -->`; `tools/figures` makes what is inside.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.plot_file import IMAGES, data_digest, digest_in_png
from llama3.errors import ConfigError, UserError
from tools.figures import PROVIDERS

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"<!-- figures:(?:begin|end)\b")
SECTION = re.compile(r"(<!-- figures:begin (\S+) -->\n).*?(<!-- figures:end -->)", re.DOTALL)


def documents(root: Path) -> list[Path]:
    """The files that may hold sections."""
    return [path for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))] if path.is_file()]


def render_document(path: Path, root: Path, known: dict[str, str]) -> str:
    """The text of `path` with every section made anew. Raises ConfigError for an unknown name or a lone marker."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(root)
    for match in SECTION.finditer(text):
        if match[2] not in known:
            raise ConfigError(f"{name}: no section is called {match[2]!r}; there are {', '.join(sorted(known))}")
        if len(MARKER.findall(match[0])) != 2:
            raise ConfigError(f"{name}: section {match[2]!r} has no `<!-- figures:end -->` before the next begins")
    if len(MARKER.findall(text)) != 2 * len(SECTION.findall(text)):
        raise ConfigError(f"{name}: not every `<!-- figures:begin NAME -->` line has its `<!-- figures:end -->`")
    images = os.path.relpath(root / IMAGES, path.parent).replace(os.sep, "/")
    made = {key: section.replace(f"]({IMAGES}/", f"]({images}/") for key, section in known.items()}
    return SECTION.sub(lambda match: f"{match[1]}\n{made[match[2]]}\n\n{match[3]}", text)


def render(root: Path, check: bool) -> list[Path]:
    """Bring documents and plots up to date, or only say (`check`) which are not. Returns those that differ."""
    known, plots = {}, {}
    for provider in PROVIDERS:
        results = provider.read(root)
        known.update(provider.sections(results))
        plots.update(provider.plots(results))
    pages = {path: render_document(path, root, known) for path in documents(root)}
    stale = [path for path, text in pages.items() if text != path.read_text(encoding="utf-8")]
    outdated = {root / IMAGES / name: plot for name, plot in plots.items()}
    outdated = {path: plot for path, plot in outdated.items() if digest_in_png(path) != data_digest(plot.data)}
    if not check:
        for path in stale:
            path.write_text(pages[path], encoding="utf-8")
        for path, plot in outdated.items():
            plot.draw(plot.data, path)
    return [*stale, *outdated]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    args = parser.parse_args(arguments)
    try:
        stale = render(ROOT, args.check)
    except UserError as error:
        print(f"render_docs.py: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'differs from the results' if args.check else 'rewritten'}")
    if args.check and stale:
        print("run python tools/render_docs.py", file=sys.stderr)
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
