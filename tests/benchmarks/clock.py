"""Times as ratios: everything that is compared is run in turn, in one process, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

_T = TypeVar("_T")


def timed(action: Callable[..., _T], *args: object) -> tuple[_T, float]:
    """Return what a call returns, and its CPU time; unlike wall-clock time it leaves out what other processes take."""
    began = time.process_time()
    result = action(*args)
    return result, time.process_time() - began


def cpu_seconds(action: Callable[[], object]) -> float:
    return timed(action)[1]


def interleaved(actions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median CPU time of each action over some rounds, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(rounds + 1):
        for name, action in actions.items():
            seconds = cpu_seconds(action)
            if i:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}
