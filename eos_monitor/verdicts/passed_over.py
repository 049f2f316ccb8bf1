"""Readings that do not count, and why."""

from __future__ import annotations

from typing import Any

from eos_monitor.readings.reading import StabilityReading


class PassedOver:
    """Counts the readings in a row that did not converge, or are stale.

    Attributes:
        count: How many, since the last that counts.
        told: Why the last one does not count, in words; None if it does.
    """

    def __init__(self) -> None:
        self.count = 0
        self.told: str | None = None

    def add(self, reading: StabilityReading) -> None:
        """Take in a reading."""
        if not reading.ready or reading.edge_ratio is None or (reading.converged and not reading.stale):
            self.count = 0
            self.told = None
            return
        self.count += 1
        readings = "reading counts" if self.count == 1 else f"of the last {self.count} readings counts"
        why = (
            next((note for note in reversed(reading.notes) if note.startswith("stale")), "stale")
            if reading.stale
            else f"it did not converge in {reading.matvecs} products"
        )
        self.told = f"No {readings}: {why}." if self.count == 1 else f"None {readings}: {why}."

    def state_dict(self) -> list[Any]:
        """Return the state as plain Python values."""
        return [self.count, self.told]

    def load_state_dict(self, state: list[Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.count, self.told = state
