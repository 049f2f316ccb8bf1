"""From readings and losses to one word."""

from __future__ import annotations

import math
from collections import deque
from enum import IntEnum
from typing import Any

from eos_monitor.stability.reading import StabilityReading

# Entering and leaving lie apart, so that a reading that hovers does not make the verdict flicker (theory: the practical
# band of the edge is 0.85 to 1.1 for methods with averaged gradients).
_ENTER_EDGE = 0.95
_LEAVE_EDGE = 0.85
_RECOVERED_AFTER = 128  # finite losses in a row


class Verdict(IntEnum):
    """What a run is doing, as far as it can be known."""

    UNKNOWN = -1
    WARMING_UP = 0
    STABLE = 1
    SHARPENING = 2
    EDGE = 3
    RESTRAINED = 4
    DIVERGING = 5


class InstabilityDetector:
    """Turns edge ratios and losses into a verdict, with hysteresis.

    In order of precedence:

    * ``DIVERGING``: a loss was not finite; left after 128 finite ones in a row.
    * ``EDGE``: an edge ratio was above 1 by more than 2·error, or two of the last three were at least 0.95; left after
      three in a row with r + 2·error < 0.85.
    * ``WARMING_UP``: no reading with an edge ratio yet, or the optimizer's state is too young.
    * ``STABLE``: r + 2·error < 1 on a full-batch reading. With minibatches instability comes earlier than r = 1, so
      that a small r proves nothing and the verdict is ``UNKNOWN``, as it is where r is too close to 1 to call.

    Readings that did not converge, or that are stale, leave the verdict as it is.

    Example:
        >>> detector = InstabilityDetector()
        >>> detector.update(0, loss=2.3)
        <Verdict.WARMING_UP: 0>
        >>> detector.update(1, loss=float("nan"))
        <Verdict.DIVERGING: 5>
    """

    def __init__(self) -> None:
        self.verdict = Verdict.WARMING_UP
        self._at_edge = False
        self._calm: Verdict = Verdict.WARMING_UP
        self._ratios: deque[float] = deque(maxlen=3)
        self._upper_bounds: deque[float] = deque(maxlen=3)
        self._finite_losses = _RECOVERED_AFTER

    def update(self, step: int, *, loss: float | None = None, reading: StabilityReading | None = None) -> Verdict:
        """Take in what is known at ``step`` and return the verdict.

        Args:
            step: Optimizer step.
            loss: Mean training loss of the step.
            reading: The reading taken at the step.
        """
        if loss is not None:
            self._finite_losses = self._finite_losses + 1 if math.isfinite(loss) else 0
        if reading is not None:
            self._take(reading)
        if self._finite_losses < _RECOVERED_AFTER:
            self.verdict = Verdict.DIVERGING
        else:
            self.verdict = Verdict.EDGE if self._at_edge else self._calm
        return self.verdict

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        return {
            "at_edge": self._at_edge,
            "calm": int(self._calm),
            "ratios": list(self._ratios),
            "upper_bounds": list(self._upper_bounds),
            "finite_losses": self._finite_losses,
            "verdict": int(self.verdict),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._at_edge = state["at_edge"]
        self._calm, self.verdict = Verdict(state["calm"]), Verdict(state["verdict"])
        self._ratios = deque(state["ratios"], maxlen=3)
        self._upper_bounds = deque(state["upper_bounds"], maxlen=3)
        self._finite_losses = state["finite_losses"]

    def _take(self, reading: StabilityReading) -> None:
        if not reading.ready:
            self._calm = Verdict.WARMING_UP
            return
        if reading.edge_ratio is None or reading.error is None:
            self._calm, self._at_edge = Verdict.UNKNOWN, False
            return
        if reading.stale or not reading.converged:
            return
        upper_bound = reading.edge_ratio + 2 * reading.error
        self._ratios.append(reading.edge_ratio)
        self._upper_bounds.append(upper_bound)
        if reading.edge_ratio - 2 * reading.error > 1.0 or sum(r >= _ENTER_EDGE for r in self._ratios) >= 2:
            self._at_edge = True
        elif len(self._upper_bounds) == 3 and max(self._upper_bounds) < _LEAVE_EDGE:
            self._at_edge = False
        self._calm = Verdict.STABLE if reading.full_batch and upper_bound < 1.0 else Verdict.UNKNOWN
