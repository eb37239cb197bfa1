"""Results as JSON, as all benchmarks write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(document: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
