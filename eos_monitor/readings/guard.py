"""Measuring that may fail: told once, given up after three failures in a row, never raised; and alike everywhere."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from eos_monitor.curvature.hessian import SumOverRanks

_GIVE_UP_AFTER = 3
_T = TypeVar("_T")


class Attempts:
    """Keeps count of failures, and of what was said about them.

    Args:
        what: What stops when it is given up, in words.
    """

    def __init__(self, what: str) -> None:
        self.off: str | None = None  # why it stopped
        self._what = what
        self._failures = 0
        self._warned: set[str] = set()

    def run(self, attempt: Callable[[], _T], smaller: Callable[[], bool] = lambda: False) -> _T | None:
        """Return what ``attempt`` returns; None if it failed.

        Args:
            attempt: What to do.
            smaller: Called when memory ran out; whether there is now less to do, so that it is worth a second attempt.
        """
        try:
            try:
                result = attempt()
            except torch.OutOfMemoryError:
                if not smaller():
                    raise
                result = attempt()
        except Exception as error:
            self._failed(error)
            return None
        self._failures = 0
        return result

    def turn_off(self, why: str) -> None:
        """Stop for the rest of the run."""
        self.off = why
        self.warn_once("off", f"eos_monitor stops {self._what}; training goes on. {why}")

    def warn_once(self, topic: str, message: str) -> None:
        """Warn, once a topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=2)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        self.warn_once("failed", f"eos_monitor could not take a reading; training goes on. {what}")
        if self._failures >= _GIVE_UP_AFTER:
            self.turn_off(f"{_GIVE_UP_AFTER} readings in a row failed, the last with {what}")


def everywhere(action: Callable[[], _T], sum_over_ranks: SumOverRanks | None, what: str) -> _T:
    """Return what ``action`` returns on each process, or fail on every one: one that goes on alone waits for ever.

    Args:
        action: What to do; sums over the processes inside of it have to be met on all of them.
        sum_over_ranks: Sum over the processes; None for one process.
        what: What each of them needs, in words.

    Raises:
        RuntimeError: If it failed on another process; here its own error is raised.
    """
    try:
        result = action()
    except Exception:
        if sum_over_ranks is not None:
            sum_over_ranks(torch.ones(1))
        raise
    if sum_over_ranks is not None and float(sum_over_ranks(torch.zeros(1))) > 0.0:
        raise RuntimeError(f"Expected every process to have {what}, got a failure on another one.")
    return result
