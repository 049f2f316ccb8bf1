"""Monitors that measure on the occasions of an EdgeOfStabilityMonitor, inside its budget."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from eos_monitor.alerts.throttle import Throttle
from eos_monitor.callbacks._compat import Callback
from eos_monitor.callbacks.edge_of_stability import EdgeOfStabilityMonitor
from eos_monitor.callbacks.outputs import RunOutputs
from eos_monitor.callbacks.reading_context import ReadingContext
from eos_monitor.readings.guard import Attempts
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.detector import Verdict


class AttachedMonitor(Callback):
    """Base of the monitors that go along with an EdgeOfStabilityMonitor: one probe, one schedule, one budget.

    Without an enabled one among the Trainer's callbacks, the companion brings one that writes nothing.

    Args:
        name: First part of the log keys and file names.
        enabled: Switch; the environment variable ``EOS_MONITOR=off`` switches every monitor off.
        settings: Of the host that is brought along; not used where one is attached.
    """

    def __init__(self, *, name: str, enabled: bool, settings: dict[str, Any]) -> None:
        super().__init__()
        if not name or "/" in name:
            raise ValueError(f"Expected a `name` without '/', got {name!r}.")
        self.name = name
        self._enabled = enabled
        self._own_host = _SilentMonitor(**settings, enabled=enabled, alerts=())
        self._own_host.companions.append(self)
        self._host: EdgeOfStabilityMonitor | None = None
        self._attempts = Attempts(f"what {type(self).__name__} measures")

    # ------------------------------------------------------------------ what a companion does

    def begin(self, trainer: Any, outputs: RunOutputs) -> None:
        """Start afresh for a new fit; :meth:`turn_off` where nothing can be measured."""
        self._outputs, self._run_id = outputs, uuid.uuid4().hex[:12]
        synchronized = any(isinstance(m, nn.SyncBatchNorm) for m in trainer.lightning_module.modules())
        if trainer.world_size > 1 and synchronized:
            self.turn_off("Synchronized batch normalization needs every process, and one alone measures.")

    def measure(self, occasion: ReadingContext) -> None:
        """Measure; called once a reading that is ready, inside the host's verification. A failure is told once."""
        raise NotImplementedError

    def settle(self, optimizers: Sequence[Any]) -> None:
        """Take in the settings that the step uses."""

    def changed(self, change: Change) -> None:
        """Answer to a new verdict, or a new advisory; it may come between readings."""

    def write(self, step: int, verdict: Verdict) -> None:
        """Write what was measured at ``step``."""

    def finish(self, step: int) -> None:
        """Draw what is drawn at the end."""

    def turn_off(self, why: str) -> None:
        """Stop measuring for the rest of the run, and say why."""
        self._attempts.turn_off(why)

    # ------------------------------------------------------------------ called by the host

    def begin_with(self, trainer: Any) -> None:
        """Start afresh: no failure so far."""
        self._attempts = Attempts(f"what {type(self).__name__} measures")
        self.begin(trainer, RunOutputs(trainer, self.name, (), self._attempts.warn_once, Throttle()))

    def take_part(self, occasion: ReadingContext) -> None:
        """Measure, unless that was given up."""
        if self._attempts.off is None:
            self._attempts.run(lambda: self.measure(occasion))

    def guard(self, action: Callable[[], None]) -> None:
        """Do what follows a measurement; a failure is told once and stays here."""
        try:
            action()
        except Exception as error:
            # Not among the attempts: one that has nothing to write would count as a success.
            self._attempts.warn_once("after", f"eos_monitor: {type(self).__name__} failed; training goes on. {error!r}")

    # ------------------------------------------------------------------ Lightning

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the host, or bring it."""
        if stage != "fit" or not self._enabled:
            return
        attached = [c for c in trainer.callbacks if isinstance(c, EdgeOfStabilityMonitor) and c.enabled]
        if attached:
            self._host = None
            if self not in attached[0].companions:
                attached[0].companions.append(self)
        else:
            self._host = self._own_host
            self._host.setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Pass on to the host that was brought along."""
        if self._host is not None:
            self._host.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Pass on to the host that was brought along."""
        if self._host is not None:
            self._host.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Pass on to the host that was brought along."""
        if self._host is not None:
            self._host.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Pass on to the host that was brought along."""
        if self._host is not None:
            self._host.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Pass on to the host that was brought along."""
        if self._host is not None:
            self._host.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Pass on to the host that was brought along."""
        if self._host is not None:
            self._host.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Pass on to the host that was brought along."""
        if self._host is not None:
            self._host.on_exception(trainer, pl_module, exception)

    @property
    def state_key(self) -> str:
        """Key of this monitor's state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        return {"host": self._own_host.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._own_host.load_state_dict(state_dict["host"])


class _SilentMonitor(EdgeOfStabilityMonitor):
    """Measures for its companions and says nothing itself."""

    _silent = True
