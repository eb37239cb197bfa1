"""Bandwidth against context at batch 1, one line a kernel, from the JSON of `benchmark_kernel.py --suite --json`.

python tools/plot_bandwidth.py results/decode_attn/suite.json docs/decode-attention-bandwidth.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAMES = {"ours": "this kernel", "fa2": "FA2 (PyTorch)", "fa3": "FA3 (vLLM)", "flashinfer": "FlashInfer"}


def plot(document: dict, target: Path) -> None:
    """Two panels, head_dim 64 and 128, 32 query and 8 kv heads; the measured read ceiling as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, head_dim in zip(axes, (64, 128), strict=True):
        rows = [r for r in document["rows"] if (r["num_heads"], r["head_dim"], r["batch"]) == (32, head_dim, 1)]
        for name, title in NAMES.items():
            points = [(r["context"], r["kv_MB"] / r["us"][name]) for r in rows if name in r["us"]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=title, linewidth=2.5 if name == "ours" else 1.2)
        axis.axhline(document["read_ceiling_TBs"], color="black", linestyle="--", linewidth=1, label="read ceiling")
        axis.set(xscale="log", title=f"head_dim {head_dim}, batch 1, 32/8 heads", xlabel="context (tokens)")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KV bytes / time (TB/s)")
    axes[0].legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
