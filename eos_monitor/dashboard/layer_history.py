"""What the layers of a run were, reading for reading, in a few numbers each."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

_WORDS = ("layer", "position", "method", "reason")  # which stay the same most of the time, and are then kept once


class _Entry(NamedTuple):
    step: int
    words: tuple[tuple[Any, ...], ...]
    cfl_numbers: array[float]
    curvatures: array[float]


class LayerHistory(Sequence[Mapping[str, Any]]):
    """Rows as the heat map takes them, kept as numbers: some 20 bytes a layer, where a row has a thousand."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._words: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # each that there was, once

    def add(self, step: int, layers: Sequence[Mapping[str, Any]]) -> None:
        """Take in a reading: for each layer the fields of ``CFLEstimate``, and its ``position`` in the net."""
        layers = sorted(layers, key=lambda layer: int(layer["position"]))
        words = tuple(self._once(tuple(layer[key] for key in _WORDS)) for layer in layers)
        words = self._once(words)
        numbers = array("d", (_known(layer["cfl_number"]) for layer in layers))
        self._entries.append(_Entry(step, words, numbers, array("d", (layer["curvature"] for layer in layers))))

    def _once(self, words: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._words.setdefault(words, words)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        if isinstance(index, slice):
            return [_row(entry) for entry in self._entries[index]]
        return _row(self._entries[index])

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(_row, self._entries)


def _known(number: float | None) -> float:
    return math.nan if number is None else number


def _row(entry: _Entry) -> Mapping[str, Any]:
    layers = [
        dict(zip(_WORDS, words, strict=True))
        | {"cfl_number": None if math.isnan(number) else number, "curvature": curvature}
        for words, number, curvature in zip(entry.words, entry.cfl_numbers, entry.curvatures, strict=True)
    ]
    return {"step": entry.step, "layers": layers}
