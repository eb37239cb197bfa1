"""Rewrite the tables and plots in README.md and docs/ from results/model/*.json, between markers.

    python tools/render_results.py            rewrite
    python tools/render_results.py --check    say what differs; exit code 1 if anything does

A section lies between `<!-- results:begin NAME -->` and `<!-- results:end -->`; `benchmarks.sections` knows the names.
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.plots import data_digest, digest_in_png, draw
from benchmarks.record import Record, load_all
from benchmarks.sections import plots, sections
from llama3.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("results/model")
IMAGES = Path("docs/images")
SECTION = re.compile(r"(<!-- results:begin (?P<name>\S+) -->\n).*?(<!-- results:end -->)", re.DOTALL)


def documents(root: Path) -> list[Path]:
    """The files that may hold sections."""
    return sorted(path for path in [root / "README.md", *(root / "docs").glob("*.md")] if path.is_file())


def render_document(text: str, path: Path, root: Path, records: list[Record]) -> str:
    """`text` with every section made anew. Raises ConfigError for a section that nobody knows."""
    images = os.path.relpath(root / IMAGES, path.parent).replace(os.sep, "/")
    known = sections(records, images)

    def fill(match: re.Match[str]) -> str:
        if match["name"] not in known:
            raise ConfigError(f"{path}: no section is called {match['name']!r}; there are {', '.join(known)}")
        return f"{match[1]}\n{known[match['name']]}\n\n{match[3]}"

    return SECTION.sub(fill, text)


def render(root: Path, check: bool) -> list[Path]:
    """Bring documents and plots up to date, or only say (`check`) which are not. Returns those that differ."""
    records = load_all((root / RESULTS).glob("*.json"))
    stale = []
    for path in documents(root):
        text = path.read_text()
        new = render_document(text, path, root, records)
        if new != text:
            stale.append(path)
            if not check:
                path.write_text(new)
    for name, data in plots(records).items():
        image = root / IMAGES / name
        if digest_in_png(image) != data_digest(data):
            stale.append(image)
            if not check:
                draw(data, image)
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something would change")
    args = parser.parse_args()
    try:
        stale = render(ROOT, args.check)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'differs from the results' if args.check else 'rewritten'}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
