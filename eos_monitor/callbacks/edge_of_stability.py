"""The monitor for Lightning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from eos_monitor.alerts.sinks import Sink
from eos_monitor.alerts.throttle import Throttle
from eos_monitor.callbacks._compat import Callback
from eos_monitor.callbacks.folders import forget_folder, run_folder
from eos_monitor.callbacks.losses import GivenLoss, MeasuredLoss, resolve_loss
from eos_monitor.callbacks.monitor_settings import MonitorSettings
from eos_monitor.callbacks.monitored_fit import WATCHING, MonitoredFit
from eos_monitor.callbacks.names import Named, settle_names
from eos_monitor.callbacks.observer import Observer, Observers
from eos_monitor.callbacks.strategy import ranks_of, unsupported
from eos_monitor.monitor.engine import Engine
from eos_monitor.readings.guard import MEASURING
from eos_monitor.readings.reading import StabilityReading
from eos_monitor.readings.settings import Probe, Solver, names_moved_arguments
from eos_monitor.verdicts.detector import Verdict


class EdgeOfStabilityMonitor(Named, Callback):
    r"""Show, while a run goes on, how far its optimizer is from the edge of stability.

    One reading is the largest eigenvalue of C^-½ (H + W) C^-½ on a fixed probe of training data, with C the curvature
    that the optimizer in use can bear: the edge ratio, 1 at the full-batch edge of every optimizer that has one. The
    run is not changed: weights, optimizer state, buffers, gradients, generators and logged metrics are what they would
    be without the monitor.

    The loss is ``loss_fn(pl_module, batch)`` if given, else ``pl_module.curvature_loss(batch)`` if defined, else
    ``training_step`` (not under manual optimization).

    ============================  =====================================================================
    key                           meaning
    ============================  =====================================================================
    ``eos/edge_ratio``            1 at the full-batch edge
    ``eos/error``                 RMS error of the edge ratio
    ``eos/normalized_sharpness``  edge ratio · threshold; lr·λ_max(H) for gradient descent
    ``eos/threshold``             its limit: 2 for gradient descent, 38 for Adam with β1 = 0.9 …
    ``eos/sharpness``             λ_max(H)
    ``eos/edge_scale``            factor on all learning rates at which the edge ratio would be 1
    ``eos/edge_lr[/<group>]``     learning rates at the full-batch edge
    ``eos/edge_ratio_clipped``    edge ratio at the learning rate that clipping by the norm leaves (SGD family)
    ``eos/edge_ratio_next``       edge ratio at the settings that the scheduler will have made for the next step
    ``eos/batch_sharpness``       curvature along minibatch gradients: under SGD this, not λ_max, settles at 2/lr
    ``eos/directional_ratio``     uᵀHu / (−2 gᵀu) along the update, where an optimizer has no threshold
    ``eos/verdict``               −1 unknown, 0 warming up, 1 stable, 2 sharpening, 3 edge, 4 restrained, 5 diverging
    ``eos/matvecs``               Hessian-vector products of the reading
    ``eos/overhead``              the monitor's share of the training time so far
    ``eos/lr_factor``             least factor on a learning rate; only with :class:`StabilityActions`
    ============================  =====================================================================

    A value that is None is not logged. Rows go to every logger under the step that Lightning logs under, and to
    ``eos_readings.jsonl`` in the log folder; a figure is drawn at the end of fit.

    Args:
        every_n_steps: Optimizer steps between readings; None for as often as ``max_overhead`` allows.
        max_overhead: Share of the training time that readings may take, in (0, 1].
        loss_fn: ``loss_fn(pl_module, batch)`` -> scalar mean loss; with several optimizers that have losses of their
            own, ``{position: loss_fn}``: each is measured over its own optimizer's parameters, optimizers without one
            are not measured, and a reading is that of the optimizer nearest to its edge.
        probe: The data to measure on, a :class:`Probe`; a kind (``"fixed"``, ``"batch"``) or an iterable of batches
            stand for one.
        solver: How readings are solved, a :class:`Solver`.
        alerts: What to do on a change of verdict: ``"log"``, ``"jsonl"`` (``eos_alerts.jsonl`` in the log folder),
            ``"wandb"`` (an alert of the run, where that logger is attached), a :class:`JSONLinesSink`, a
            :class:`WebhookSink`, or any function of an :class:`Alert`.
        expose_metrics: Also put the numbers where EarlyStopping, ModelCheckpoint and the progress bar find them
            (``callback_metrics``); the one trace that a monitor can leave.
        verify: When to compare the run before and after a reading: ``"first"`` (until the first complete one),
            ``"always"`` or False. A change, behind an object that the sandbox cannot copy, say, is named in a warning
            and switches this monitor off.
        enabled: Switch; the environment variable ``EOS_MONITOR=off`` switches every monitor off.
        name: First part of the log keys and file names.
        alert_cooldown: Seconds for which the same change of verdict is told once only, unless it got worse since; at
            most ten alerts go out in a minute, and what was held back is counted at the end of fit.
        projections: Follow each update (its size, and its projections on the critical mode and on a random vector):
            one copy of the parameters and six passes over them a step. None for if it fits into the budget, and with
            ``every_n_steps`` for nets of up to 2²⁴ parameters in any case.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument does not exist, or belongs to :class:`Probe`, :class:`Solver` or
            :class:`StabilityActions`.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[EdgeOfStabilityMonitor()], logger=False)  # doctest: +SKIP
        >>> trainer.fit(module, loader)  # doctest: +SKIP
        >>> print(trainer.callbacks[0].report())  # doctest: +SKIP
    """

    _silent = False  # whether what goes along with it does the writing

    # Of one fit: set by _start_afresh.
    _engine: Engine
    _throttle: Throttle
    _loss: MeasuredLoss | None  # of a fit that is watched
    _fit: MonitoredFit | None
    _used: bool  # in a fit
    _resumed: bool  # from a checkpoint

    @names_moved_arguments
    def __init__(
        self,
        every_n_steps: int | None = None,
        max_overhead: float = 0.05,
        *,
        loss_fn: GivenLoss | None = None,
        probe: Probe | str | Iterable[Any] = "fixed",
        solver: Solver | None = None,
        alerts: Sequence[str | Sink] = ("log",),
        expose_metrics: bool = False,
        verify: Literal["first", "always", False] = "first",
        enabled: bool = True,
        name: str = "eos",
        alert_cooldown: float = 60.0,
        projections: bool | None = None,
    ) -> None:
        super().__init__(name)
        self.enabled = enabled
        self.observers: list[Observer] = []  # what goes along with it through a fit
        self._settings = MonitorSettings(
            every_n_steps=every_n_steps,
            max_overhead=max_overhead,
            loss_fn=loss_fn,
            probe=Probe.of(probe),
            solver=solver or Solver(),
            alerts=alerts if isinstance(alerts, str) else tuple(alerts),
            expose_metrics=expose_metrics,
            verify=verify,
            name=name,
            alert_cooldown=alert_cooldown,
            projections=projections,
            silent=self._silent,
        )
        self._start_afresh()

    def _start_afresh(self) -> None:
        settings = self._settings
        self._engine = Engine(
            settings.probe,
            settings.solver,
            every_n_steps=settings.every_n_steps,
            max_overhead=settings.max_overhead,
        )
        self._throttle = Throttle(settings.alert_cooldown)
        self._loss = None
        self._fit = None
        self._used = False
        self._resumed = False

    # ------------------------------------------------------------------ what users read

    @property
    def readings(self) -> list[StabilityReading]:
        """All readings of the last fit, oldest first."""
        return self._engine.readings

    @property
    def eigenvectors(self) -> Tensor | None:
        """Critical modes of the last reading, ``(n, k)``: directions in the order of the optimizers' parameters."""
        return self._engine.eigenvectors

    @property
    def verdict(self) -> Verdict:
        """Verdict as of the last step."""
        return self._engine.verdict

    @property
    def advisory(self) -> str | None:
        """What to look out for beside the verdict: ``"jump-risk"``, ``"loss-excess"``, or None."""
        return self._engine.detector.advisory

    @property
    def off(self) -> dict[str, str]:
        """What has been switched off in this fit, and why."""
        return dict(self._engine.guard.off)

    def report(self) -> str:
        """Tell the run in a few sentences."""
        return self._engine.report()

    def state_dict(self) -> dict[str, Any]:
        """Return the detector's state, and what it was about, as plain Python values."""
        return self._engine.state_dict() | {"alerts": self._throttle.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. The first reading after it is a cold one."""
        self._resumed = True
        self._engine.load_state_dict(state_dict)
        self._throttle.load_state_dict(state_dict["alerts"])

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start afresh for a new fit, under a name that no other callback of the Trainer has."""
        settle_names(trainer.callbacks)
        if stage == "fit":
            forget_folder(trainer)
        if stage == "fit" and self._used:
            self._start_afresh()

    def take_name(self, name: str) -> None:
        """Go by another name."""
        super().take_name(name)
        self._settings = replace(self._settings, name=name)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the configuration, before anything is trained.

        Raises:
            MisconfigurationException: If there is no loss that can be measured.
        """
        self._used = True
        if not self.enabled or os.environ.get("EOS_MONITOR", "").lower() == "off":
            return
        why_not = unsupported(trainer)
        if why_not:
            self._engine.guard.turn_off(MEASURING, why_not)
            return
        self._loss = resolve_loss(self._settings.loss_fn, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch the fit, and start the clock."""
        loss = self._loss
        if loss is None:
            return
        loss = self._loss = loss.of(trainer.optimizers)
        # Of this fit: the monitor may have been in another Trainer with others.
        self.observers = [observer for observer in self.observers if observer in trainer.callbacks]
        # Here, because all processes have to come by: nothing below may be waited for by another one.
        ranks = ranks_of(trainer)
        folder = run_folder(trainer, self._engine.guard, resumed=self._resumed)

        try:
            self._engine.share(ranks)
            self._fit = MonitoredFit(
                trainer,
                pl_module,
                folder=folder,
                loss=loss,
                settings=self._settings,
                engine=self._engine,
                throttle=self._throttle,
                observers=self.observers,
                owner=self,
            )
        except Exception as error:
            ranks.leave()
            self._engine.guard.turn_off(WATCHING, f"{type(error).__name__}: {error}")
            # Some may have begun.
            Observers(self.observers).each(lambda observer: observer.finish(trainer.global_step))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure, if this micro-batch opens an optimizer step at which a reading is due."""
        if self._fit is not None:
            self._fit.before_batch(batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Read the learning rates that the step uses."""
        if self._fit is not None:
            self._fit.before_optimizer_step(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the reading of this step, and take in its loss."""
        if self._fit is not None:
            self._fit.after_batch(outputs)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take a last reading if there is none yet or the budget has room, and draw the figure."""
        if self._fit is not None:
            self._fit.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Draw the figure of what there is."""
        if self._fit is not None:
            self._fit.break_off()
