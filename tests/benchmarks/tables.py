"""Tables: on the terminal, and between the markers of docs/cost.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

_T = TypeVar("_T")


@dataclass(frozen=True)
class Table:
    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


class Progress:
    """One bar a section."""

    def __init__(self, name: str) -> None:
        self._name = name

    def over(self, items: Sequence[_T]) -> Iterator[_T]:
        yield from tqdm(items, desc=self._name, unit="case")


def write(tables: Iterable[Table], path: Path) -> None:
    """Replace what stands between ``<!-- bench:name -->`` and ``<!-- end -->``.

    Raises:
        ValueError: If the file has no such place.
    """
    text = path.read_text(encoding="utf-8")
    for table in tables:
        before, marker, rest = text.partition(f"<!-- bench:{table.name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not marker or not end:
            raise ValueError(f"Expected a place for the table {table.name!r} in {path.name}.")
        text = f"{before}{marker}{table.markdown()}\n{end}{after}"
    path.write_text(text, encoding="utf-8")
