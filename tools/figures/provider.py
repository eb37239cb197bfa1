"""What a provider of figures is: result files in; named sections of Markdown, and plots, out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama3.errors import ConfigError


class Results(dict[str, Any]):
    """What result files hold, by file name without suffix. A name that is missing raises ConfigError."""

    def __init__(self, pattern: str, files: dict[str, Any]) -> None:
        super().__init__(files)
        self.pattern = pattern

    def __missing__(self, name: str) -> Any:
        raise ConfigError(f"the documents show {name}.json of {self.pattern}, and there is no such file")


@dataclass(frozen=True)
class Plot:
    """Everything that a plot shows, and what draws it into a PNG with `benchmarks.plot_file.save`."""

    data: dict[str, Any]
    draw: Callable[[dict[str, Any], Path], None]


def sections_by_file(results: Results, suffix: str, table: Callable[[dict[str, Any]], str]) -> dict[str, str]:
    """A section for every file, of its device and a table: with suffix "x", `a_b.json` becomes "a-b-x"."""
    return {f"{name.replace('_', '-')}-{suffix}": f"{r['device']}:\n\n{table(r)}" for name, r in results.items()}


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no results can be read from it ({error})") from error


def no_plots(results: Results) -> dict[str, Plot]:
    return {}


@dataclass(frozen=True)
class Provider:
    """files: a glob from the root of the repository. sections, plots: pure functions of what these files hold.

    Sections go by name, unique among all providers; in them a plot is linked to as seen from the root. Plots go by
    file name.
    """

    files: str
    sections: Callable[[Results], dict[str, str]]
    plots: Callable[[Results], dict[str, Plot]] = no_plots
    load: Callable[[Path], Any] = read_json

    def read(self, root: Path) -> Results:
        return Results(self.files, {path.stem: self.load(path) for path in sorted(root.glob(self.files))})
