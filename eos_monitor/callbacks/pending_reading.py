"""The reading of the present step, from its measurement to its row."""

from __future__ import annotations

from dataclasses import dataclass, replace

from eos_monitor.readings.reading import Measurement, StabilityReading


@dataclass
class PendingReading:
    """A reading that is measured before a step, carried to the settings that the step uses, and written after it.

    Attributes:
        measurement: The measurement.
        beside_seconds: What observers took beside it.
        carried: It at the settings of the step; None before the update.
    """

    measurement: Measurement
    beside_seconds: float = 0.0
    carried: StabilityReading | None = None

    def carry(self, reading: StabilityReading | None) -> None:
        """Take the reading at the settings of the step; None marks the measured one as stale."""
        self.carried = reading or replace(self.measurement.reading, stale=True)

    @property
    def reading(self) -> StabilityReading:
        """The reading as far as it is known."""
        return self.carried or self.measurement.reading
