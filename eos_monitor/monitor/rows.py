"""Rows of plain values: what becomes of a reading, and what goes into files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, overload

from eos_monitor.readings.reading import StabilityReading


class _Entry(NamedTuple):
    run: str
    verdict: str
    overhead: float | None
    reading: StabilityReading


class Rows(Sequence[dict[str, Any]]):
    """Readings as plain values, each with the verdict of its time.

    A row is made when it is asked for: as a dictionary of its own it would take twice the memory of the reading.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def add(self, run: str, verdict: str, overhead: float | None, reading: StabilityReading) -> None:
        """Take in a reading."""
        self._entries.append(_Entry(run, verdict, overhead, reading))

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [_row(entry) for entry in self._entries[index]]
        return _row(self._entries[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_row, self._entries)


def _row(entry: _Entry) -> dict[str, Any]:
    return {"run": entry.run, "verdict": entry.verdict, "overhead": entry.overhead} | asdict(entry.reading)


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
