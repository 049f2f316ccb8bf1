"""Callbacks that go along with an EdgeOfStabilityMonitor, inside its budget."""

from __future__ import annotations

import uuid
from typing import Any

from torch import nn

from eos_monitor.alerts.throttle import Throttle
from eos_monitor.callbacks._compat import Callback
from eos_monitor.callbacks.edge_of_stability import EdgeOfStabilityMonitor
from eos_monitor.callbacks.names import Named, settle_names
from eos_monitor.callbacks.observer import Observer, WatchedFit
from eos_monitor.callbacks.outputs import RunOutputs
from eos_monitor.readings.guard import Guard


class AttachedMonitor(Named, Callback, Observer):
    """Base of the callbacks that go along with an EdgeOfStabilityMonitor: one probe, one schedule, one budget.

    Without an enabled one among the Trainer's callbacks, it brings one that writes nothing.

    Args:
        name: First part of the log keys and file names.
        enabled: Switch; the environment variable ``EOS_MONITOR=off`` switches every monitor off.
        settings: Of the monitor that is brought along; not used where one is attached.
    """

    # Of one fit: set by begin.
    _outputs: RunOutputs
    _run_id: str

    def __init__(self, *, name: str, enabled: bool, settings: dict[str, Any]) -> None:
        super().__init__(name)
        self.guard = Guard()
        self._enabled = enabled
        self._own_host = _SilentMonitor(**settings, enabled=enabled, alerts=())
        self._own_host.observers.append(self)
        self._host: EdgeOfStabilityMonitor | None = None

    def begin(self, fit: WatchedFit) -> None:
        """Start afresh for a new fit: no failure so far."""
        self.guard = Guard()
        self.guard.alone = fit.engine.guard.alone
        self._outputs = RunOutputs(fit.trainer, fit.outputs.shared_folder, self.name, (), self.guard, Throttle())
        self.tell_name(self._outputs.say)
        self._run_id = uuid.uuid4().hex[:12]

    def turn_off_if_synchronized(self, trainer: Any) -> None:
        """Stop measuring where one process alone cannot."""
        synchronized = any(isinstance(m, nn.SyncBatchNorm) for m in trainer.lightning_module.modules())
        if trainer.world_size > 1 and synchronized:
            self.turn_off("Synchronized batch normalization needs every process, and one alone measures.")

    # ------------------------------------------------------------------ Lightning

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the host, or bring it."""
        settle_names(trainer.callbacks)
        if stage != "fit" or not self._enabled:
            return
        attached = [c for c in trainer.callbacks if isinstance(c, EdgeOfStabilityMonitor) and c.enabled]
        if attached:
            self._host = None
            if self not in attached[0].observers:
                attached[0].observers.append(self)
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

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        return {"host": self._own_host.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._own_host.load_state_dict(state_dict["host"])


class _SilentMonitor(EdgeOfStabilityMonitor):
    """Measures for what goes along with it, and says nothing itself."""

    _silent = True
