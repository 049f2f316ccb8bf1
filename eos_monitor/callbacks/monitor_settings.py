"""What a monitor was told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eos_monitor.alerts.sinks import Sink, check_alerts
from eos_monitor.callbacks.losses import GivenLoss
from eos_monitor.monitor.verification import check_verify
from eos_monitor.readings.settings import Probe, Solver


@dataclass(frozen=True)
class MonitorSettings:
    """The arguments of an :class:`EdgeOfStabilityMonitor`, checked; their meaning is told there.

    Attributes:
        silent: Write nothing: what goes along with the monitor does.

    Raises:
        ValueError: If a value is out of range.
    """

    every_n_steps: int | None
    max_overhead: float
    loss_fn: GivenLoss | None
    probe: Probe
    solver: Solver
    alerts: Sequence[str | Sink]
    expose_metrics: bool
    verify: str | bool
    name: str
    alert_cooldown: float
    projections: bool | None
    silent: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        check_alerts(self.alerts)
        check_verify(self.verify)


def check_name(name: str) -> None:
    """Check the first part of log keys and file names.

    Raises:
        ValueError: If it is none.
    """
    if not name or "/" in name:
        raise ValueError(f"Expected a `name` without '/', got {name!r}.")
