"""Losses that leave their bounds, and whether they stay outside."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from statistics import median
from typing import Any

_WINDOW = 256
_FIRST = 5
_ABOVE = 3.0  # × the median
_ABOVE_IN_A_ROW = 24
_FAR = 10.0  # × the median
_FAR_ABOVE_START = 100.0
_FAR_IN_A_ROW = 3
_LOST_ABOVE_START = 1e4  # no bounded run of 811 without a second moment went above 200
_BACK = 1.5  # × the median
_BACK_IN_A_ROW = 128


class Excursions:
    """Whether the loss is out of bounds.

    With med the median of the 256 losses before, and start the median of the first five: out once the loss is not
    finite, or above 3 med and start for 24 losses in a row, or (unless ``adaptive``) above 10 med and 100 start for 3
    in a row, or 10⁴ start at once; back after 128 in a row below 1.5 med. Half of all healthy runs at the edge exceed
    10 med and return, so that a shorter excursion says nothing.

    Args:
        adaptive: Whether the second moment of the optimizer catches a blow-up: Adam comes back from peaks that end
            gradient descent.

    Attributes:
        out: Whether it is out of bounds.
        not_finite_at: Step of the first loss that was not finite since then; None without one.
        crossed_at: Step at which the present excursion above 3 med began; None outside of one.
        confirmed_at: Step at which ``out`` was set.
    """

    def __init__(self, adaptive: bool) -> None:
        self._adaptive = adaptive
        self._losses: list[float] = []
        self._sorted: list[float] = []
        self._start: list[float] = []
        self._above = 0
        self._far = 0
        self._back = 0
        self.out = False
        self.not_finite_at: int | None = None
        self.crossed_at: int | None = None
        self.confirmed_at: int | None = None

    @property
    def level(self) -> float | None:
        """Median of the last losses; None before the first."""
        values = self._sorted
        middle = len(values) // 2
        if not values:
            return None
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2

    @property
    def lateness(self) -> int | None:
        """Steps from the first loss above 3 med to the confirmation; None unless out of bounds."""
        if self.confirmed_at is None or self.crossed_at is None:
            return None
        return self.confirmed_at - self.crossed_at

    def add(self, step: int, loss: float) -> None:
        """Take in the loss of a step."""
        if not math.isfinite(loss):
            self._back = 0
            self.crossed_at = step if self.crossed_at is None else self.crossed_at
            self.not_finite_at = step if self.not_finite_at is None else self.not_finite_at
            self._confirm(step)
            return
        level = self.level
        start = median(self._start) if self._start else loss
        above = level is not None and loss > _ABOVE * level
        if above and self.crossed_at is None:
            self.crossed_at = step
        elif not above and not self.out:
            self.crossed_at = None
        far = level is not None and loss > _FAR * level and loss > _FAR_ABOVE_START * start
        self._above = self._above + 1 if above and loss > start else 0
        self._far = self._far + 1 if far and not self._adaptive else 0
        lost = self._far > 0 and loss > _LOST_ABOVE_START * start
        if lost or self._above >= _ABOVE_IN_A_ROW or self._far >= _FAR_IN_A_ROW:
            self._confirm(step)
        self._back = self._back + 1 if level is None or loss < _BACK * level else 0
        if self.out and self._back >= _BACK_IN_A_ROW:
            self.out = False
            self.not_finite_at = None
            self.crossed_at = None
            self.confirmed_at = None
        self._remember(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        return {
            "losses": list(self._losses),
            "start": list(self._start),
            "counts": [self._above, self._far, self._back],
            "out": [self.out, self.not_finite_at, self.crossed_at, self.confirmed_at],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._losses = list(state["losses"])
        self._start = list(state["start"])
        self._sorted = sorted(self._losses)
        self._above, self._far, self._back = state["counts"]
        self.out, self.not_finite_at, self.crossed_at, self.confirmed_at = state["out"]

    def _confirm(self, step: int) -> None:
        self.confirmed_at = self.confirmed_at if self.out else step
        self.out = True

    def _remember(self, loss: float) -> None:
        if len(self._start) < _FIRST:
            self._start.append(loss)
        self._losses.append(loss)
        insort(self._sorted, loss)
        if len(self._losses) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._losses.pop(0))]
