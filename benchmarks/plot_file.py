"""A PNG that knows which data it shows, so that it is drawn again only when they have changed. Needs matplotlib."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama3.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = "docs/images"  # where the plots of the documents lie, from the root of the repository
DIGEST_KEY = "Data-SHA256"  # of the plotted data, as a text chunk of the PNG


def check_path(path: Path) -> None:
    """Raise RequestError, before anything is measured, if `path` is no PNG or nothing can be drawn here."""
    if path.suffix.lower() != ".png":
        raise RequestError(f"a plot is a PNG, and {path} does not end in .png")
    new_figure(1, 1)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, without a display. Raises RequestError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RequestError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, data: dict[str, Any], path: Path) -> None:
    """Write `figure`, which shows `data`: tens of kilobytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={DIGEST_KEY: data_digest(data), "Software": None})


def data_digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def digest_in_png(path: Path) -> str | None:
    """The digest that `save` wrote into a PNG; None if there is no such file or no digest in it."""
    if not path.exists():
        return None
    content, position = path.read_bytes(), 8
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        body = content[position + 8 : position + 8 + length]
        if kind == b"tEXt" and body.startswith(DIGEST_KEY.encode() + b"\0"):
            return body.split(b"\0", 1)[1].decode("latin-1")
        position += length + 12
    return None
