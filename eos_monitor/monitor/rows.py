"""Rows of plain values in files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a JSON-lines file; numbers that JSON lacks become null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(row), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
