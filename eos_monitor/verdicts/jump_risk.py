"""The risk of a fast rise of the learning rate, told before the step that uses it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_RISE = 1.4
_SPAN = 5  # steps
_LASTS = 64  # steps

# Edge ratio r0 after the rise above which it is told, by class: 4/5 of the 5 % quantile of the failed jumps in the
# calibration runs of tests/benchmarks/detector.py, or less where an earlier suite saw failures below.
_CUTS = {
    "gradient descent": 2.3,
    "Nesterov": 1.2,
    "heavy ball": 1.35,
    "Adam": 2.0,
    "SGD, minibatches": 1.7,
    "momentum, minibatches": 0.3,
}
# Bounds of r0, and how many of the development runs' jumps into each range failed: (failed, jumps); docs/detector.md.
_BOUNDS = (0.6, 1.2, 2.5, 5.0, 10.0)
_FAILED: dict[str, tuple[tuple[int, int], ...]] = {
    "gradient descent": ((0, 0), (0, 1), (0, 3), (7, 12), (6, 6), (1, 1)),
    "Nesterov": ((0, 0), (0, 3), (6, 6), (6, 6), (6, 6), (1, 1)),
    "heavy ball": ((0, 0), (0, 0), (8, 9), (4, 4), (4, 4), (3, 3)),
    "Adam": ((0, 0), (0, 0), (2, 9), (6, 14), (7, 16), (5, 6)),
    "SGD, minibatches": ((0, 1), (0, 2), (0, 4), (3, 3), (9, 9), (2, 2)),
    "momentum, minibatches": ((0, 6), (5, 7), (5, 5), (1, 1), (0, 0), (0, 0)),
}


def class_of(family: str, momentum: float, full_batch: bool) -> str:
    """Return the class of optimizers whose jumps are counted together."""
    if family == "adam":
        return "Adam"
    if full_batch:
        return "Nesterov" if family == "nesterov" else "heavy ball" if momentum >= 0.5 else "gradient descent"
    return "momentum, minibatches" if momentum >= 0.5 else "SGD, minibatches"


def cut_of(kind: str) -> float:
    """Return the edge ratio after a rise from which it is told, for a class of optimizers."""
    return _CUTS[kind]


class JumpRisk:
    """A rise of the learning rate by 1.4 or more within five steps, to a high edge ratio.

    Attributes:
        ratio: Edge ratio r0 at the highest learning rate of the present event; None outside of one.
        at: Step at which the event was noticed.
    """

    def __init__(self) -> None:
        self._recent: list[list[float]] = []  # step, lr
        self.ratio: float | None = None
        self.at: int | None = None

    def add(self, step: int, lr: float | None, lr_ahead: float | None, ratio: float | None, kind: str) -> None:
        """Take in the learning rate of a step before it is taken.

        Args:
            step: The step.
            lr: Its learning rate.
            lr_ahead: The highest of the next five steps, if known.
            ratio: Edge ratio at ``lr``.
            kind: Class of the optimizer, see :func:`class_of`.
        """
        if self.at is not None and not 0 <= step - self.at <= _LASTS:
            self.ratio = None
            self.at = None
        if lr is None or not 0.0 < lr < math.inf:
            return
        self._recent = [entry for entry in self._recent if 0 < step - entry[0] <= _SPAN]
        low = min([lr, *(value for _, value in self._recent)])
        top = lr if lr_ahead is None or not math.isfinite(lr_ahead) else max(lr, lr_ahead)
        self._recent.append([step, lr])
        if ratio is None or max(top / lr, lr / low) < _RISE:
            return
        reached = ratio * top / lr
        if reached > _CUTS[kind] and (self.ratio is None or reached > self.ratio):
            self.at = step if self.at is None else self.at
            self.ratio = reached

    def advice(self, kind: str) -> str | None:
        """Return the risk in words, with how many of the benchmark's jumps of this class failed; None without one."""
        if self.ratio is None:
            return None
        counts = _failures_at(self.ratio, kind)
        share = f"; of {counts[1]} such jumps in the benchmark {counts[0]} failed" if counts else ""
        return f"The learning rate rises fast, to an edge ratio of {self.ratio:.2g}{share}."

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        return {"recent": [list(entry) for entry in self._recent], "ratio": self.ratio, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._recent = [list(entry) for entry in state["recent"]]
        self.ratio = state["ratio"]
        self.at = state["at"]


def _failures_at(ratio: float, kind: str) -> tuple[int, int] | None:
    """Return how many of the suite's jumps of this class to about this edge ratio failed, and how many there were."""
    counts: Sequence[tuple[int, int]] = _FAILED.get(kind, ())
    place = sum(ratio > bound for bound in _BOUNDS)
    return counts[place] if place < len(counts) and counts[place][1] else None
