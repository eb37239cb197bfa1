"""Write the figures of models/demo/training.json into docs/demo-model.md, between its two markers.

python tools/demo_report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "models" / "demo" / "training.json"
PAGE = ROOT / "docs" / "demo-model.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def render(record: dict[str, Any]) -> str:
    """The page's generated part: figures, loss curve, settings and hashes as Markdown tables."""
    corpus, settings = record["corpus"], record["settings"]
    figures = [
        ("source", record["source"]),
        ("files (train / validation / held out)", counts(corpus["files"])),
        ("bytes", counts(corpus["bytes"])),
        ("training tokens", f"{corpus['training_tokens']:,}, read {passes(record):.0f} times"),
        ("sha256 of the source", f"`{corpus['sha256']}`"),
        ("parameters", f"{record['parameters']:,}"),
        ("steps, seconds, device", f"{record['steps']:,}, {record['seconds']:.0f}, {record['device']}"),
        ("validation loss (nats a token)", record["validation_loss"]),
        ("**held-out loss**", f"**{record['held_out_loss']}**"),
        ("**held-out perplexity** (a token)", f"**{record['held_out_perplexity']}**"),
        ("**held-out bits a byte**", f"**{record['held_out_bits_per_byte']}**"),
        ("seed", settings["seed"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    curve = [(e["step"], e["seconds"], e["train_loss"], e["validation_loss"]) for e in record["evaluations"]]
    return "\n\n".join(
        [
            table(("figure", "value"), figures),
            "The loss on the way (the training loss is with dropout, over the steps since the row before):",
            table(("step", "seconds", "training loss", "validation loss"), [*curve[:-1:2], curve[-1]]),
            "Settings: " + ", ".join(f"`{name}` {value}" for name, value in settings.items()) + ".",
            table(("file", "sha256"), [(f"`{name}`", f"`{digest}`") for name, digest in record["sha256"].items()]),
        ]
    )


def counts(by_split: dict[str, int]) -> str:
    return " / ".join(f"{by_split[name]:,}" for name in ("train", "validation", "held_out"))


def passes(record: dict[str, Any]) -> float:
    """How often the run saw each training token, on average."""
    settings = record["settings"]
    return record["steps"] * settings["batch_size"] * settings["sequence_length"] / record["corpus"]["training_tokens"]


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def insert(page: str, figures: str) -> str:
    """``page`` with everything between the markers replaced."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{figures}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), render(json.loads(RECORD.read_text()))), encoding="utf-8")
