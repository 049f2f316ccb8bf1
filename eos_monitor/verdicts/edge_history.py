"""The last readings of the edge ratio, followed to the learning rate of the present step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

from eos_monitor.readings.reading import StabilityReading

_KEPT = 16
_CLEARLY = 0.02  # a relative error below which two readings of a run are not told apart
_PROBE_ERROR = 0.1  # relative, of a sample whose spread is not known
_TREND = 8  # readings
_TREND_NEEDS = 6
_STEEP = 1e-4  # e-folds of curvature per step


class Entry(NamedTuple):
    """What is kept of a reading: plain numbers.

    Attributes:
        step: Step of the reading.
        ratio: Edge ratio.
        error: Its RMS error, at least 2 % of it.
        lr: Learning rates that it was read at.
        rose: Whether the ratio came to above 1 with this reading.
        batch: Batch sharpness as a share of its small-batch line 2(1 − β)/η; None if it was not measured.
        batch_error: Its standard error.
    """

    step: int
    ratio: float
    error: float
    lr: tuple[float, ...]
    rose: bool
    batch: float | None = None
    batch_error: float = 0.0


class EdgeHistory:
    """The last 16 usable readings.

    Attributes:
        entries: The readings, oldest first.
        full_batch: Whether the last one was on all the data of a step.
        beyond: Which of them were clearly above 1, and would be at the present learning rate.
        rises: Crossings of 1 from below, of readings that would be above 1 at the present learning rate.
        growth: Relative growth of the curvature per step where it is significant, else None: median of the pairwise
            slopes of ln(r / lr) over 8 readings, whose 10 % quantile is positive (Theil and Sen).
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.full_batch = False
        self.beyond: list[bool] = []
        self.rises = 0
        self.growth: float | None = None
        self._above = False
        self._lr: tuple[float, ...] | None = None
        self._factor: float | None = None

    def add(self, reading: StabilityReading) -> None:
        """Keep a reading that has an edge ratio."""
        assert reading.edge_ratio is not None
        r = reading.edge_ratio
        error = max(reading.error or 0.0, _CLEARLY * abs(r))
        if not reading.full_batch and reading.sampling_error is None:
            error = math.hypot(error, _PROBE_ERROR * r)
        rose = not self._above and r - error > 1.0
        self._above = r + error >= 1.0 if self._above else rose
        batch, batch_error = _share_of_line(reading)
        self.entries.append(Entry(reading.step, r, error, tuple(reading.lr), rose, batch, batch_error))
        del self.entries[:-_KEPT]
        self.full_batch = reading.full_batch
        self.growth = _growth(self.entries[-_TREND:])
        self.beyond = []  # until they are followed

    def clear(self) -> None:
        """Forget all readings."""
        self.entries = []
        self.beyond = []
        self.rises = 0
        self.growth = None
        self._above = False
        self._factor = None

    def follow(self, lr: tuple[float, ...] | None) -> None:
        """Carry the readings to the learning rates of the present step.

        A cut takes the run from the edge at once, so that older readings shrink with it. A raise counts with the
        readings that see it, and in :attr:`ratio`: on a slow one the curvature gives way.
        """
        if lr == self._lr and len(self.beyond) == len(self.entries):
            return
        self._lr = lr
        # A cut only makes smaller: most readings need not be carried, and a schedule calls this at each step.
        self.beyond = [
            e.ratio - 2 * e.error > 1.0 and _cut(lr, e.lr) * (e.ratio - 2 * e.error) > 1.0 for e in self.entries
        ]
        self.rises = sum(e.rose and e.ratio > 1.0 and _cut(lr, e.lr) * e.ratio > 1.0 for e in self.entries)
        self._factor = _factor(lr, self.entries[-1].lr) if self.entries else None

    @property
    def ratio(self) -> float | None:
        """The last edge ratio at the present learning rates; an upper bound where groups moved apart."""
        return None if self._factor is None else self.entries[-1].ratio * self._factor

    @property
    def batch_share(self) -> tuple[float, float] | None:
        """The last batch sharpness as a share of its small-batch line, and the share's error; None if not measured."""
        if self._factor is None or self.entries[-1].batch is None:
            return None
        return self._factor * self.entries[-1].batch, self._factor * self.entries[-1].batch_error

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        return {
            "entries": [[*e[:3], list(e.lr), *e[4:]] for e in self.entries],
            "full_batch": self.full_batch,
            "growth": self.growth,
            "above": self._above,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.entries = [
            Entry(step, r, error, tuple(lr), rose, batch, batch_error)
            for step, r, error, lr, rose, batch, batch_error in state["entries"]
        ]
        self.full_batch = state["full_batch"]
        self.growth = state["growth"]
        self._above = state["above"]
        self.beyond = []


def _factor(now: Sequence[float] | None, then: Sequence[float]) -> float | None:
    """Return what the edge ratio is multiplied by; None where a reading at lr = 0 tells nothing of another."""
    if now is None or now == then:
        return 1.0
    if len(now) == 1:  # one for all groups: a common schedule
        then = then[:1]
    pairs = [(a, b) for a, b in zip(now, then, strict=False) if a or b]
    if len(now) != len(then) or any(not b > 0.0 for _, b in pairs):
        return None
    return max((a / b for a, b in pairs), default=1.0)


def _cut(now: Sequence[float] | None, then: Sequence[float]) -> float:
    factor = _factor(now, then)
    return 1.0 if factor is None else min(1.0, factor)


def _share_of_line(reading: StabilityReading) -> tuple[float | None, float]:
    sharpness = reading.batch_sharpness
    error = reading.batch_sharpness_error
    limits = reading.batch_sharpness_limits
    if sharpness is None or error is None or limits is None or not limits[0] > 0.0:
        return None, 0.0
    return sharpness / limits[0], error / limits[0]


def _growth(entries: Sequence[Entry]) -> float | None:
    top = [max(e.lr, default=1.0) for e in entries]
    points = [
        (e.step, math.log(e.ratio / lr)) for e, lr in zip(entries, top, strict=True) if e.ratio > 0.0 and lr > 0.0
    ]
    slopes = sorted((y - x) / (t - s) for (s, x), (t, y) in combinations(points, 2) if t > s)
    if len(points) < _TREND_NEEDS or not slopes or slopes[len(slopes) // 10] <= 0.0:
        return None
    middle = median(slopes)
    return middle if middle > _STEEP else None
