"""Messages about a change of verdict, and where they go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eos_monitor.stability.detector import Verdict
from eos_monitor.stability.reading import StabilityReading

Sink = Callable[["Alert"], None]


@dataclass(frozen=True)
class Alert:
    """A change of verdict.

    Attributes:
        step: Optimizer step.
        verdict: What the run is doing now.
        previous: What it was doing before.
        message: The change in plain words, with the numbers behind it.
    """

    step: int
    verdict: Verdict
    previous: Verdict
    message: str


def alert_of(
    step: int, verdict: Verdict, previous: Verdict, reading: StabilityReading | None, loss: float | None
) -> Alert:
    """Word the change from ``previous`` to ``verdict``."""
    return Alert(step, verdict, previous, f"step {step}: {_meaning(verdict, reading, loss)} [{verdict.name}]")


def check_alerts(alerts: Sequence[str | Sink]) -> None:
    """Check the ``alerts=`` argument: a sequence of ``"log"`` and of functions of an :class:`Alert`.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(alerts, str) or not all(callable(alert) or alert == "log" for alert in alerts):
        raise ValueError(f"Expected `alerts` to be a sequence of 'log' and functions of an Alert, got {alerts!r}.")


def sinks_of(alerts: Sequence[str | Sink], logger: logging.Logger) -> list[Sink]:
    """Resolve a checked ``alerts=`` argument; ``"log"`` goes to ``logger``."""
    return [_LogSink(logger) if isinstance(alert, str) else alert for alert in alerts]


@dataclass(frozen=True)
class _LogSink:
    logger: logging.Logger

    def __call__(self, alert: Alert) -> None:
        level = logging.WARNING if alert.verdict >= Verdict.EDGE else logging.INFO
        self.logger.log(level, "eos_monitor: %s", alert.message)


def _meaning(verdict: Verdict, reading: StabilityReading | None, loss: float | None) -> str:
    numbers = _numbers(reading)
    if verdict is Verdict.DIVERGING:
        return f"the loss is not finite ({loss}). Restart from an earlier checkpoint at a lower learning rate"
    if verdict is Verdict.EDGE:
        return (
            f"at the full-batch edge of stability ({numbers}). This is where training usually settles; it is no failure"
        )
    if verdict is Verdict.STABLE:
        return f"below the full-batch edge of stability ({numbers})"
    if verdict is Verdict.WARMING_UP:
        return "the optimizer's state is too young to tell its edge"
    if reading is not None and reading.edge_ratio is None:
        return "no edge is known here" + (f": {'; '.join(reading.notes)}" if reading.notes else "")
    if reading is not None and not reading.full_batch:
        return (
            f"below the full-batch edge ({numbers}); under minibatch noise instability comes earlier, so this does not "
            "say that the run is stable"
        )
    return f"near the edge, too close to call ({numbers})"


def _numbers(reading: StabilityReading | None) -> str:
    if reading is None or reading.edge_ratio is None:
        return "no reading yet"
    error = f" ± {reading.error:.2g}" if reading.error is not None else ""
    sharpness = ""
    if reading.normalized_sharpness is not None and reading.threshold is not None:
        sharpness = f"; normalized sharpness {reading.normalized_sharpness:.3g} of {reading.threshold:.3g}"
    return f"edge ratio {reading.edge_ratio:.3g}{error}{sharpness}"
