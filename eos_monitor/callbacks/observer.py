"""What goes along with a monitor through a fit, inside its budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from eos_monitor.callbacks.outputs import RunOutputs
from eos_monitor.callbacks.reading_context import ReadingContext
from eos_monitor.forecast.lookahead import Settings
from eos_monitor.forecast.tracked_reading import TrackedReading
from eos_monitor.isolation.exchange import ExchangeError
from eos_monitor.monitor.engine import Engine
from eos_monitor.readings.guard import Guard
from eos_monitor.readings.reading import Measurement
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.detector import Verdict


@dataclass(frozen=True)
class WatchedFit:
    """The fit that an observer goes along with.

    Attributes:
        trainer: The Trainer.
        pl_module: Its module.
        optimizers: Those of its optimizers that are measured.
        engine: What the monitor knows of the run.
        outputs: Where it writes.
    """

    trainer: Any
    pl_module: Any
    optimizers: Sequence[Any]
    engine: Engine
    outputs: RunOutputs


class Observer:
    """Base of what goes along with a monitor: every method is called by the monitor, and does nothing by default.

    Attributes:
        guard: Keeps its failures from ending the run; a new one for each fit.
        needs_every_loss: Whether the verdict has to be up to date at each step.
    """

    guard: Guard
    needs_every_loss: bool = False

    @property
    def measuring(self) -> str:
        """What it measures, as the guard's activity."""
        return f"what {type(self).__name__} measures"

    def turn_off(self, why: str) -> None:
        """Stop measuring for the rest of the run, and say why."""
        self.guard.turn_off(self.measuring, why)

    def begin(self, fit: WatchedFit) -> None:
        """Start afresh for a new fit."""

    def before_step(self, step: int, tracked: TrackedReading) -> TrackedReading | None:
        """Answer to what has changed, before anything else of ``step``; return a reading to go on from, if another."""

    def measured(self, measurement: Measurement) -> None:
        """Take in a reading of the monitor's."""

    def measure(self, context: ReadingContext) -> None:
        """Measure beside a reading that is ready, inside the monitor's verification."""

    def keep(self, step: int, tracked: TrackedReading) -> None:
        """Keep what is needed of the state before ``step``; after the reading, if there is one."""

    def before_update(self, step: int, tracked: TrackedReading) -> None:
        """Decide on the update of ``step``; once a step."""

    def before_optimizer_step(self, optimizer: Any) -> None:
        """Take in that the update of ``optimizer`` comes next."""

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """Show the settings that the update uses."""
        yield

    def ahead(self, settings: Settings | None) -> Settings | None:
        """Return settings of a step to come as the update will use them."""
        return settings

    def factor(self) -> float | None:
        """Return the factor on the first learning rate of the schedule; None for none."""
        return None

    def settle(self, optimizers: Sequence[Any]) -> None:
        """Take in the settings that the step uses."""

    def metrics(self, name: str) -> dict[str, float]:
        """Return what is logged with a reading, under keys that begin with ``name``."""
        return {}

    def changed(self, change: Change) -> None:
        """Answer to a new verdict, or a new advisory; it may come between readings."""

    def write(self, step: int, verdict: Verdict) -> None:
        """Write what was measured at ``step``."""

    def finish(self, step: int) -> None:
        """Leave the run as it is at its end, and draw what is drawn there."""


class Observers:
    """The observers of a monitor, asked in their order.

    Args:
        observers: They.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._all = tuple(observers)

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def need_every_loss(self) -> bool:
        """Whether the verdict has to be up to date at each step."""
        return any(observer.needs_every_loss for observer in self._all)

    def each(self, action: Callable[[Observer], None], *, together: bool = False) -> None:
        """Ask every one; a failure is told once and stays there.

        Args:
            action: What to ask.
            together: Whether what follows has to be alike on all processes.
        """
        for observer in self._all:
            observer.guard.run(
                f"what {type(observer).__name__} does",
                lambda observer=observer: action(observer),  # type: ignore[misc]
                gives_up=False,
                together=together,
            )

    def measure(self, context: ReadingContext) -> None:
        """Let every one measure that has not given it up; a loss that one process cannot evaluate alone ends it."""

        def ask(observer: Observer) -> None:
            try:
                observer.measure(context)
            except ExchangeError as error:
                observer.turn_off(str(error))

        for observer in self._all:
            observer.guard.run(observer.measuring, lambda observer=observer: ask(observer))  # type: ignore[misc]

    def before_step(self, step: int, tracked: TrackedReading) -> TrackedReading:
        """Let every one answer; return the reading to go on from."""
        answers: list[TrackedReading] = []

        def ask(observer: Observer) -> None:
            answer = observer.before_step(step, tracked)
            if answer is not None:
                answers.append(answer)

        self.each(ask, together=True)
        return answers[-1] if answers else tracked

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """Show the settings that the update uses."""
        with ExitStack() as stack:
            for observer in self._all:
                stack.enter_context(observer.in_effect())
            yield

    def ahead(self, settings: Settings | None) -> Settings | None:
        """Return settings of a step to come as the update will use them."""
        for observer in self._all:
            settings = observer.ahead(settings)
        return settings

    def scaled(self, rate: float | None) -> float | None:
        """Return a learning rate of the first group as the update would use it."""
        for observer in self._all:
            factor = observer.factor()
            if rate is not None and factor is not None:
                rate *= factor
        return rate

    def metrics(self, name: str) -> dict[str, float]:
        """Return what they log with a reading."""
        return {key: value for observer in self._all for key, value in observer.metrics(name).items()}
