"""The rhythm of a run's updates, without any Hessian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import Any

_WINDOW = 64
_RECENT = 32
_LONG = 128
_LAGS = (2, 3, 4, 5, 6, 8)
_LOCKED = 0.98
_FLIPPING = 0.2  # share of sign changes below which a slow drift, not a cycle, correlates with itself
_LASTING = 0.5  # share of the power of the older half that the newer half must have
_LOOK_EVERY = 8  # updates between searches for a period, the only sums over the window
_STILL = 1e-9


class Oscillation:
    """The sizes and projections of the last updates.

    Args:
        momentum: β of the optimizer (β1 of Adam).

    Attributes:
        period: Period that the updates are locked to; None without one. A lag whose autocorrelation over 64 updates is
            above 0.98, for a series that changes sign in more than 20 % of the steps and does not die out.
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._along: list[float] = []  # on the critical mode
        self._at_random: list[float] = []  # on a fixed random vector
        self._sizes: list[float] = []
        self._seen = 0
        self.period: int | None = None

    def add(self, projection: float | None, random_projection: float | None, relative_update: float | None) -> None:
        """Take in what is known of one update. What is not finite is passed over."""
        for series, value, length in (
            (self._along, projection, _WINDOW),
            (self._at_random, random_projection, _WINDOW),
            (self._sizes, relative_update, _LONG),
        ):
            if value is not None and math.isfinite(value):
                series.append(value)
                del series[:-length]
        self._seen += 1
        if self._seen % _LOOK_EVERY == 0:
            self.period = _period(self._along) or _period(self._at_random)

    @property
    def flips(self) -> float | None:
        """Share of sign changes between neighbouring updates along the critical mode, 0 to 1; None before 16."""
        series = self._along or self._at_random
        return _flips(series) if len(series) >= 16 else None

    @property
    def edge_ratio(self) -> float | None:
        """The edge ratio without a Hessian, r̂ = (β − ρ1) / (1 + β); None before 64 updates.

        ρ1 is the lag-1 autocorrelation of the projections on the critical mode. Unbiased where independent gradient
        noise drives the mode (sd 0.09 at β = 0 and r = 0.5, 0.02 at β = 0.9); blind in a run without noise until an
        oscillation has built up.
        """
        rho = _autocorrelation(self._along, 1) if len(self._along) == _WINDOW else None
        return None if rho is None else (self._momentum - rho) / (1 + self._momentum)

    @property
    def amplification(self) -> float | None:
        """Growth of the projections' amplitude over the last 32 updates, in e-folds per update; None before 32."""
        series = self._along or self._at_random
        old = sum(x * x for x in series[-_RECENT : -_RECENT // 2])
        new = sum(x * x for x in series[-_RECENT // 2 :])
        if len(series) < _RECENT or not 0.0 < old < math.inf or not 0.0 < new < math.inf:
            return None
        return math.log(new / old) / _RECENT

    @property
    def sizes_known(self) -> bool:
        """Whether 32 relative updates were seen."""
        return len(self._sizes) >= _RECENT

    @property
    def still(self) -> bool:
        """Whether nothing has moved for 32 updates: relative updates below 1e-9."""
        return self.sizes_known and max(self._sizes[-_RECENT:]) < _STILL

    @property
    def moving(self) -> bool:
        """Whether the updates are neither tiny nor dying out; True while that is not known."""
        if not self.sizes_known:
            return True
        return max(self._sizes[-_RECENT:]) > 1e-7 and not self.decaying

    @property
    def decaying(self) -> bool:
        """Whether the largest of the last 32 relative updates is below half the largest of the 64 oldest of 128."""
        if len(self._sizes) < _LONG:
            return False
        return max(self._sizes[-_RECENT:]) < 0.5 * max(self._sizes[: _LONG // 2])

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        return {
            "series": [list(self._along), list(self._at_random), list(self._sizes)],
            "seen": self._seen,
            "period": self.period,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._along, self._at_random, self._sizes = (list(series) for series in state["series"])
        self._seen = state["seen"]
        self.period = state["period"]


def _flips(series: Sequence[float]) -> float:
    return sum(a * b < 0 for a, b in zip(series, series[1:], strict=False)) / (len(series) - 1)


def _autocorrelation(series: Sequence[float], lag: int) -> float | None:
    """Correlate about zero: updates that oscillate have no mean, and those that drift shall correlate."""
    early = series[:-lag]
    late = series[lag:]
    scale = math.sqrt(sum(map(mul, early, early)) * sum(map(mul, late, late)))
    return sum(map(mul, early, late)) / scale if 0.0 < scale < math.inf else None


def _period(series: Sequence[float]) -> int | None:
    if len(series) < _WINDOW or _flips(series) <= _FLIPPING:
        return None
    # A vibration that dies out correlates with itself as well as one that lasts.
    half = _WINDOW // 2
    if sum(map(mul, series[half:], series[half:])) < _LASTING * sum(map(mul, series[:half], series[:half])):
        return None
    found = ((lag, _autocorrelation(series, lag)) for lag in _LAGS)
    return next((lag for lag, rho in found if rho is not None and rho > _LOCKED), None)
