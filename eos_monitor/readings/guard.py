"""What must not end the run: failures are told once, given up after three in a row, and never raised."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from eos_monitor.curvature.hessian import SumOverRanks

MEASURING = "measuring"
VERIFYING = "verifying a reading"
_FAILED = {MEASURING: " could not take a reading", VERIFYING: " could not verify a reading"}
_GIVE_UP_AFTER = 3
_T = TypeVar("_T")


class ProcessLeftError(RuntimeError):
    """Another process of the run has stopped to take part."""


class Guard:
    """Keeps what a monitor does from ending the run that it watches.

    Every activity has failures of its own: the first one is told in one warning, and after three in a row the activity
    is off for the rest of the run, which is told too.

    Attributes:
        off: Activity -> why it stopped.
        alone: Whether this process is the only one. Among several, a failure that one alone has must not be swallowed
            where the others would wait for it: it goes on to the hook that the activity runs in, which ends the
            watching on all of them.
    """

    def __init__(self) -> None:
        self.off: dict[str, str] = {}
        self.alone = True
        self._failures: Counter[str] = Counter()
        self._told: set[str] = set()

    def run(
        self,
        activity: str,
        action: Callable[[], _T],
        *,
        smaller: Callable[[], bool] | None = None,
        gives_up: bool = True,
        together: bool = False,
    ) -> _T | None:
        """Return what ``action`` returns; None if it failed, or the activity is off.

        Args:
            activity: What it is, in words.
            action: What to do.
            smaller: Called when memory ran out; whether there is now less to do, so that it is worth a second attempt.
            gives_up: Whether three failures in a row end the activity.
            together: Whether what follows has to be alike on all processes.
        """
        if activity in self.off:
            return None
        try:
            result = _in_memory(action, smaller)
        except Exception as error:
            if together and not self.alone:
                raise
            self.failed(activity, error, gives_up=gives_up)
            return None
        self._failures[activity] = 0
        return result

    def failed(self, activity: str, error: Exception, *, gives_up: bool = True) -> None:
        """Count a failure, and tell it if it is the first."""
        self._failures[activity] += 1
        what = _described(error)
        words = _FAILED.get(activity, f": {activity} failed")
        self.warn_once(f"failed {activity}", f"eos_monitor{words}; training goes on. {what}")
        if gives_up and self._failures[activity] >= _GIVE_UP_AFTER:
            attempts = "readings" if activity == MEASURING else "attempts"
            self.turn_off(activity, f"{_GIVE_UP_AFTER} {attempts} in a row failed, the last with {what}")

    def turn_off(self, activity: str, why: str) -> None:
        """Stop an activity for the rest of the run."""
        self.off[activity] = why
        self.warn_once(f"off {activity}", f"eos_monitor stops {activity}; training goes on. {why}")

    def warn_once(self, topic: str, message: str) -> None:
        """Warn, once a topic."""
        if topic not in self._told:
            self._told.add(topic)
            warnings.warn(message, stacklevel=2)


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
            sum_over_ranks(torch.ones(1, device="cpu"))
        raise
    if sum_over_ranks is not None and float(sum_over_ranks(torch.zeros(1, device="cpu"))) > 0.0:
        raise RuntimeError(f"Expected every process to have {what}, got a failure on another one.")
    return result


def _in_memory(action: Callable[[], _T], smaller: Callable[[], bool] | None) -> _T:
    try:
        return action()
    except torch.OutOfMemoryError:
        if smaller is None or not smaller():
            raise
    # Outside of the handler: its traceback would keep the first attempt's tensors.
    return action()


def _described(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(where[0].filename).name}:{where[0].lineno})" if where else ""
    return f"{type(error).__name__}: {error}{place}"
