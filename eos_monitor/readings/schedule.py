"""When to measure: every n steps, or as often as a share of the wall clock allows."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

_RETRY_STEPS = 5  # until enough steps have passed to know how long one takes
_JITTER = 0.2
_TIMED_STEPS = 3  # before the first reading: one whose time is not known is not affordable


class Schedule:
    """The optimizer steps at which a reading is due, and the account of the monitor's own time.

    With ``every_n_steps`` the cadence is exact. Without it, a reading is due when what was spent and what the next one
    is predicted to cost stay within ``max_overhead`` of the training time; the intervals are jittered by ± 20 %, since
    regular readings alias with periodic orbits. Start-up costs are kept apart and are not charged.

    Args:
        every_n_steps: Steps between readings, ≥ 1; None for the wall-clock share.
        max_overhead: Share of the training time that readings may take, in (0, 1].
        seed: Seed of the jitter.
        clock: Seconds that only go forward.

    Attributes:
        spent: Seconds of the monitor's own, start-up left out.
        startup: Seconds of its start-up.
        next_step: Step of the next decision.
        predicted_cost: Seconds that the next reading is expected to take.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        max_overhead: float = 0.05,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` >= 1 or None, got {every_n_steps}.")
        if not 0.0 < max_overhead <= 1.0:
            raise ValueError(f"Expected 0 < `max_overhead` <= 1, got {max_overhead}.")
        self.every_n_steps = every_n_steps
        self.max_overhead = max_overhead
        self.spent = 0.0
        self.startup = 0.0
        self.next_step = 0
        self.predicted_cost = 0.0
        self._jitter = random.Random(seed)
        self._clock = clock
        self._began: float | None = None
        self._ended: float | None = None
        self._spent_before = 0.0  # own time before the training clock was started
        self._first_step = 0
        self._decided: int | None = None
        self._timed: tuple[int, float] | None = None  # the second step, and the training time before it
        self._asked = 0
        self._at_asked = 0.0
        self._readings = 0
        self._costs: deque[float] = deque(maxlen=10)

    def begin(self, step: int) -> None:
        """Start the training clock, at ``step``."""
        self._began = self._clock()
        self._ended = None
        self._spent_before = self.spent + self.startup
        self._first_step = step
        self._timed = None
        self.next_step = step

    def end(self) -> None:
        """Stop the training clock."""
        self._ended = self._clock()

    def own_time(self, *, startup: bool = False) -> AbstractContextManager[None]:
        """Charge what happens inside to the monitor."""
        return _OwnTime(self, self._clock, startup)

    @property
    def training_seconds(self) -> float:
        """Wall-clock time since the start without the monitor's own."""
        if self._began is None:
            return 0.0
        now = self._clock() if self._ended is None else self._ended
        return now - self._began - (self.spent + self.startup - self._spent_before)

    @property
    def overhead(self) -> float | None:
        """Own time as a share of the training time; None before there is any."""
        return self.spent / self.training_seconds if self.training_seconds > 0.0 else None

    @property
    def step_seconds(self) -> float | None:
        """Time of a training step, the first left out; None before it is known."""
        if self._timed is None or self._asked <= self._timed[0]:
            return None
        return (self._at_asked - self._timed[1]) / (self._asked - self._timed[0])

    def pace(self, step: int) -> None:
        """Look at the clock before ``step``."""
        if step > self._first_step:
            self._asked = step
            self._at_asked = self.training_seconds
            self._timed = self._timed or (step, self._at_asked)

    def due(self, step: int) -> bool:
        """Whether to measure before ``step``; postpones the next decision if the time is not there yet."""
        if self.every_n_steps is not None:
            return step != self._decided and step % self.every_n_steps == 0
        if not self.deciding(step):
            return False
        self.pace(step)
        if self._readings == 0:
            return step - self._first_step >= _TIMED_STEPS
        if self.affordable():
            return True
        self._plan(step)
        return False

    def deciding(self, step: int) -> bool:
        """Whether ``step`` is one at which the budget is consulted."""
        return step != self._decided and step >= self.next_step

    def affordable(self) -> bool:
        """Whether one more reading stays within the share."""
        return self.spent + self.predicted_cost <= self.max_overhead * self.training_seconds

    def measured(self, step: int, seconds: float) -> None:
        """Take in that a reading before ``step`` took ``seconds``, and plan the next."""
        # The first one is cold and checks its products: a poor prediction for those that follow. Of these one in ten
        # looks further and costs two or three times the median, so that only the dearest of ten keeps the promise.
        if self._readings > 0:
            self._costs.append(seconds)
        self.predicted_cost = max(self._costs, default=seconds / 2)
        self._readings += 1
        self._decided = step
        self._plan(step)

    def costs_change(self, factor: float) -> None:
        """Say that readings cost so many times as much from now on."""
        self._costs = deque((factor * cost for cost in self._costs), maxlen=self._costs.maxlen)
        self.predicted_cost *= factor

    def postpone(self, step: int, steps: int) -> None:
        """Decide no sooner than ``steps`` from ``step``."""
        self._decided = step
        self.next_step = step + steps

    def _plan(self, step: int) -> None:
        """Set the step of the next decision: when the time should be there, by what a step has taken so far."""
        steps = step - self._first_step
        seconds = self.training_seconds
        missing = (self.spent + self.predicted_cost) / self.max_overhead - seconds
        if steps == 0 or seconds <= 0.0:
            wait = 1.0
        else:
            # Never sooner than the share allows, so the jitter is around 1 / (1 − 0.2) of the shortest interval.
            jitter = self._jitter.uniform(1 - _JITTER, 1 + _JITTER) / (1 - _JITTER)
            wait = max(1.0, missing / (seconds / steps)) * jitter
        # Early steps are a poor clock: look again when there are twice as many.
        self.next_step = step + min(math.ceil(wait), max(_RETRY_STEPS, steps))


class _OwnTime(AbstractContextManager[None]):
    """Own time of the monitor. A class, because a generator takes twice as long, and each step enters three."""

    def __init__(self, schedule: Schedule, clock: Callable[[], float], startup: bool) -> None:
        self._schedule = schedule
        self._clock = clock
        self._startup = startup
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = self._clock()

    def __exit__(self, *_: object) -> None:
        seconds = self._clock() - self._began
        if self._startup:
            self._schedule.startup += seconds
        else:
            self._schedule.spent += seconds
