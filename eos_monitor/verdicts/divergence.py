"""Losses out of bounds that are the optimizer's doing."""

from __future__ import annotations

from eos_monitor.verdicts.excursions import Excursions

_HOT = 0.9  # an edge ratio from which on an excess of the loss may be the optimizer's doing
_HOT_BEFORE = 64  # steps


class Divergence:
    """Whether a run is being lost: the rule of ``DIVERGING``, and its memory.

    Args:
        losses: Losses of the run.
        momentum: β of the optimizer.

    Attributes:
        hot_at: Last step with an edge ratio that may drive the loss out of its bounds; None without one.
        blamed: Whether the present excess of the loss is the optimizer's doing.
    """

    def __init__(self, losses: Excursions, momentum: float) -> None:
        self.hot_at: int | None = None
        self.blamed = False
        self._losses = losses
        self._momentum = momentum

    def add(self, step: int, ratio: float | None, kind: str) -> None:
        """Take in the edge ratio of a step, and the class of the optimizer."""
        hot = _HOT
        if kind == "momentum, minibatches":  # it fails from its small-batch line on, at r = (1 − β) / (1 + β)
            hot = _HOT * (1 - self._momentum) / (1 + self._momentum)
        if ratio is not None and ratio > hot:
            self.hot_at = step

    def judge(self, ratio: float | None) -> str | None:
        """Return why the run counts as lost, at this edge ratio; None if it does not."""
        losses = self._losses
        if losses.crossed_at is None or not losses.out:
            self.blamed = False
            return None
        hot = self.hot_at is not None and self.hot_at >= losses.crossed_at - _HOT_BEFORE
        self.blamed = self.blamed or losses.not_finite_at is not None or hot or ratio is None
        if not self.blamed:
            return None
        if losses.not_finite_at is not None:
            return f"The loss is not finite, as of step {losses.not_finite_at}."
        return (
            f"The loss has been above 3 times its median since step {losses.crossed_at}; this was confirmed "
            f"{losses.lateness} steps later."
        )
