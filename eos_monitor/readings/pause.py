"""How long a reading may hold the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from eos_monitor.curvature.hessian import SumOverRanks

_SOLVING = 0.7  # of the time: what comes after a solve (its check, error, scale) takes the rest


class Pause:
    """The time of one reading after the other.

    Args:
        clock: Seconds that only go forward.

    Attributes:
        seconds: Most that the reading may take; infinite where whoever measures has chosen the cost.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = math.inf
        self._clock = clock
        self._began = 0.0
        self._sum_over_ranks: SumOverRanks | None = None

    def begin(self, seconds: float | None, sum_over_ranks: SumOverRanks | None) -> None:
        """Begin a reading.

        Args:
            seconds: Most that it may take; None for any time.
            sum_over_ranks: Sum over the processes that take it together.
        """
        self.seconds = math.inf if seconds is None else seconds
        self._began = self._clock()
        self._sum_over_ranks = sum_over_ranks

    def is_over(self) -> bool:
        """Whether no more products should be taken; the same on every process."""
        if math.isinf(self.seconds):
            return False
        late = self._clock() - self._began > _SOLVING * self.seconds
        if self._sum_over_ranks is None:
            return late
        return bool(self._sum_over_ranks(torch.tensor([float(late)], device="cpu")) > 0.0)
