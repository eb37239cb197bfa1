"""Rewrite what the docs and the README show of decode attention, tables and figure, from results/decode_attn/*.json.

    python tools/render_docs.py            rewrite
    python tools/render_docs.py --check    exit with 1 and name the file if a table is out of date

A table lies between `<!-- decode_attn:begin NAME -->` and `<!-- decode_attn:end -->`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "docs/decode-attention.md", ROOT / "README.md")
FIGURE = ROOT / "docs/images/decode-attention-bandwidth.png"
RESULTS = ROOT / "results/decode_attn"
SECTION = re.compile(r"(<!-- decode_attn:begin (\w+) -->\n).*?(<!-- decode_attn:end -->)", re.DOTALL)
PEERS = {"fa2": "FA2", "fa3": "FA3", "flashinfer": "FlashInfer"}


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]])


def _best_peer(row: dict) -> float:
    return min(row["us"][name] for name in PEERS if name in row["us"])


def _bandwidth(row: dict, name: str = "ours") -> float:
    """TB/s of KV bytes."""
    return row["kv_MB"] / row["us"][name]


def suite() -> str:
    document = load("suite")
    lines = []
    for row in document["rows"]:
        us = row["us"]
        peers = [f"{us[name]:.1f}" if name in us else "–" for name in PEERS]
        paged = f"{us['ours, block table']:.2f}" if "ours, block table" in us else "–"
        lines.append(
            [
                *(row["label"], f"{row['kv_MB']:.1f}", f"{row['floor_us']:.2f}", f"**{us['ours']:.2f}**", paged),
                *(f"{us['ours, fused']:.2f}", *peers, f"{_best_peer(row) / us['ours']:.2f}"),
                *(f"{_bandwidth(row):.2f}", f"{row['fraction_of_ceiling']:.0%}"),
            ]
        )
    head = ["q/kv heads, head size: batch x context", "KV MB", "floor", "ours", "block table", "fused"]
    head += [*PEERS.values(), "best peer / ours", "TB/s", "of the ceiling"]
    return _table(head, lines)


def summary() -> str:
    document = load("suite")
    ratios = [_best_peer(row) / row["us"]["ours"] for row in document["rows"]]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    versions = document["environment"]["versions"]
    return (
        f"{document['environment']['gpu']}, CUDA {versions['cuda']}, torch {versions['torch']}, "
        f"vLLM {versions['vllm']} (FA3), FlashInfer {versions['flashinfer']}. Over the {len(ratios)} rows the best "
        f"peer takes {mean:.2f} times as long in the geometric mean, {min(ratios):.2f} at least, {max(ratios):.2f} at "
        f"most."
    )


LADDER_STEPS = {
    "naive": "one block a query head; every byte is read once for each head of the group",
    "split": "the context is cut into parts, a second kernel combines them",
    "tensor_core": "the group shares each tile, staged in shared memory, on tensor cores",
    "ring": "even ranges of tiles for a fixed grid; a loading warp runs ahead with cp.async; merged in the same launch",
    "tma": "the copy engine loads whole tiles, so that one thread keeps the ring full",
}


def ladder() -> str:
    rows = load("ladder")["rows"]
    lines = [
        [f"`{version}`", step, *[f"{row['us'][version]:.1f}" for row in rows]] for version, step in LADDER_STEPS.items()
    ]
    return _table(["version", "what changed", *[f"{row['label']} (µs)" for row in rows]], lines)


def experiments() -> str:
    document = load("experiments")
    lines = [
        [r["change"], r["shape"], f"{r['before_us']:.2f}", f"{r['after_us']:.2f}", "yes" if r["kept"] else "no"]
        for r in document["rows"]
    ]
    return _table(["change", "shape", "before (µs)", "after (µs)", "kept"], lines)


def ncu() -> str:
    by_events = {row["label"]: row["us"]["ours"] for row in load("suite")["rows"]}
    lines = []
    for row in load("ncu")["rows"]:
        events, rate = by_events[row["label"]], row["dram_MB"] / row["us"]
        lines.append(
            [
                *(row["label"], f"{events:.2f}", f"{row['us']:.2f}", f"{row['us'] / events - 1:+.1%}", f"{rate:.2f}"),
                f"{row['percent_of_dram_peak']:.1f} %",
            ]
        )
    return _table(["shape", "graph (µs)", "ncu (µs)", "difference", "DRAM TB/s", "of the DRAM peak"], lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "suite": suite,
    "summary": summary,
    "ladder": ladder,
    "experiments": experiments,
    "ncu": ncu,
}


def render(text: str) -> str:
    return SECTION.sub(lambda match: f"{match[1]}{SECTIONS[match[2]]()}\n{match[3]}", text)


def main() -> int:
    stale = {path: new for path in DOCUMENTS if (new := render(text := path.read_text())) != text}
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run python tools/render_docs.py", file=sys.stderr)
        return int(bool(stale))
    for path, new in stale.items():
        path.write_text(new)
    sys.path.insert(0, str(ROOT))
    from tools.plot_bandwidth import plot

    plot(load("suite"), FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
