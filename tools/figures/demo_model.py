"""How the demo model was trained, by `tools/train_demo_model.py`, which writes training.json beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.text_table import markdown_table
from tools.figures.provider import Results


def sections(results: Results) -> dict[str, str]:
    return {"demo-model": report(results["training"])}


def report(record: dict[str, Any]) -> str:
    """Figures, loss curve, settings and hashes."""
    corpus, settings = record["corpus"], record["settings"]
    figures = [
        ("source", record["source"]),
        ("files (train / validation / held out)", _counts(corpus["files"])),
        ("bytes", _counts(corpus["bytes"])),
        ("training tokens", f"{corpus['training_tokens']:,}, read {_passes(record):.0f} times"),
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
            _table(("figure", "value"), figures),
            "The loss on the way (the training loss is with dropout, over the steps since the row before):",
            _table(("step", "seconds", "training loss", "validation loss"), [*curve[:-1:2], curve[-1]]),
            "Settings: " + ", ".join(f"`{name}` {value}" for name, value in settings.items()) + ".",
            _table(("file", "sha256"), [(f"`{name}`", f"`{digest}`") for name, digest in record["sha256"].items()]),
        ]
    )


def _counts(by_split: dict[str, int]) -> str:
    return " / ".join(f"{by_split[name]:,}" for name in ("train", "validation", "held_out"))


def _passes(record: dict[str, Any]) -> float:
    """How often the run saw each training token, on average."""
    settings = record["settings"]
    return record["steps"] * settings["batch_size"] * settings["sequence_length"] / record["corpus"]["training_tokens"]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return markdown_table(header, [[str(cell) for cell in row] for row in rows])
