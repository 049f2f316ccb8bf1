"""The monitor for Lightning."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from eos_monitor.alerts.sinks import Sink, check_alerts
from eos_monitor.callbacks._compat import Callback
from eos_monitor.callbacks.actions import Actions
from eos_monitor.callbacks.monitored_fit import FitSettings, MonitoredFit
from eos_monitor.monitor.engine import Engine
from eos_monitor.readings.gauge import Gauge
from eos_monitor.readings.reading import StabilityReading
from eos_monitor.readings.settings import Solver
from eos_monitor.verdicts.detector import Verdict

if TYPE_CHECKING:
    from eos_monitor.callbacks.attached_monitor import AttachedMonitor


class EdgeOfStabilityMonitor(Callback):
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
    ``eos/lr_factor``             least factor that an action has put on a learning rate; only with actions
    ============================  =====================================================================

    A value that is None is not logged. Rows go to every logger under the step that Lightning logs under, and to
    ``eos_readings.jsonl`` in the log folder; a figure is drawn at the end of fit.

    Args:
        every_n_steps: Optimizer steps between readings; None for as often as ``max_overhead`` allows.
        max_overhead: Share of the training time that readings may take, in (0, 1].
        loss_fn: ``loss_fn(pl_module, batch)`` -> scalar mean loss.
        probe: ``"fixed"`` (copies of the first training batches, on the CPU), ``"batch"`` (the batch of the step), or
            an iterable of batches.
        probe_samples: Samples to collect for ``"fixed"``, in whole batches.
        k: Number of eigenvalues per reading, or ``"edge"`` for all of at least 0.75.
        rtol: Relative residual of a reading.
        raw_sharpness: Solve for λ_max(H) too where it does not follow from the edge ratio, at the cost of a second
            solve.
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
        full_batch: Whether the probe is all the data that a step uses; None finds out (an epoch is one step on it).
        batch_size_fn: Samples in a batch; by default the first dimension of its first tensor.
        max_matvecs: Bound on the Hessian-vector products of one solve.
        method: ``"auto"``, ``"double-backward"`` or ``"fd"``, see :class:`HessianOperator`.
        alert_cooldown: Seconds for which the same change of verdict is told once only, unless it got worse since; at
            most ten alerts go out in a minute, and what was held back is counted at the end of fit.
        projections: Follow each update (its size, and its projections on the critical mode and on a random vector):
            one copy of the parameters and six passes over them a step. None for if it fits into the budget.
        seed: Seed of start vectors and jitter.
        actions: What may be done about an instability: ``"cap-lr"`` (on a fast rise of a learning rate, from that step
            on), and once DIVERGING is confirmed ``"checkpoint"`` (also at the risk of a jump), ``"restore"`` (go back
            to a state from before, at half the learning rates) and ``"stop"`` (with ``"restore"``: if that cannot be).
        dry_run: Only say what would have been done: in the log, to the alerts, and in ``eos_actions.jsonl``.
        edge_target: Edge ratio at which ``"cap-lr"`` aims; None for half of where jumps of the kind were seen to fail,
            and at most 1.
        lr_floor: Smallest factor that actions put on a learning rate, in (0, 1].
        action_cooldown: Steps until a capped learning rate may rise again.
        snapshot_every: Steps between the states that are kept, on the CPU, for ``"restore"``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an alert is neither a name nor callable.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[EdgeOfStabilityMonitor()], logger=False)  # doctest: +SKIP
        >>> trainer.fit(module, loader)  # doctest: +SKIP
        >>> print(trainer.callbacks[0].report())  # doctest: +SKIP
    """

    _silent = False  # whether its companions do the writing

    def __init__(
        self,
        every_n_steps: int | None = None,
        max_overhead: float = 0.05,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        probe: str | Iterable[Any] = "fixed",
        probe_samples: int = 256,
        k: int | Literal["edge"] = 1,
        rtol: float = 1e-2,
        raw_sharpness: bool = False,
        alerts: Sequence[str | Sink] = ("log",),
        expose_metrics: bool = False,
        verify: Literal["first", "always", False] = "first",
        enabled: bool = True,
        name: str = "eos",
        full_batch: bool | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        max_matvecs: int = 64,
        method: Literal["auto", "double-backward", "fd"] = "auto",
        alert_cooldown: float = 60.0,
        projections: bool | None = None,
        seed: int = 0,
        actions: Sequence[str] = (),
        dry_run: bool = True,
        edge_target: float | None = None,
        lr_floor: float = 1e-3,
        action_cooldown: int = 64,
        snapshot_every: int = 32,
    ) -> None:
        super().__init__()
        if not name or "/" in name:
            raise ValueError(f"Expected a `name` without '/', got {name!r}.")
        check_alerts(alerts)
        self.name = name
        self.enabled = enabled
        self.companions: list[AttachedMonitor] = []  # monitors that measure on the same occasions
        self._settings = FitSettings(
            name=name,
            loss_fn=loss_fn,
            alerts=tuple(alerts),
            expose_metrics=expose_metrics,
            verify=verify,
            full_batch=full_batch,
            alert_cooldown=alert_cooldown,
            projections=projections,
            silent=self._silent,
        )
        self._solver = Solver(k, rtol, max_matvecs, method, raw_sharpness, seed)
        self._engine_settings: dict[str, Any] = {
            "every_n_steps": every_n_steps,
            "max_overhead": max_overhead,
            "probe": probe,
            "probe_samples": probe_samples,
            "batch_size_fn": batch_size_fn,
            "seed": seed,
        }
        self._action_settings: dict[str, Any] = {
            "names": actions if isinstance(actions, str) else tuple(actions),
            "dry_run": dry_run,
            "target": edge_target,
            "floor": lr_floor,
            "cooldown": action_cooldown,
            "snapshot_every": snapshot_every,
        }
        self._fit = self._new_fit()

    def _new_fit(self) -> MonitoredFit:
        engine = Engine(Gauge(self._solver, self._engine_settings["batch_size_fn"]), **self._engine_settings)
        return MonitoredFit(self._settings, engine, Actions(**self._action_settings), self)

    # ------------------------------------------------------------------ what users read

    @property
    def readings(self) -> list[StabilityReading]:
        """All readings of the last fit, oldest first."""
        return self._fit.engine.readings

    @property
    def eigenvectors(self) -> Tensor | None:
        """Critical modes of the last reading, ``(n, k)``: directions in the order of the optimizers' parameters."""
        return self._fit.engine.eigenvectors

    @property
    def verdict(self) -> Verdict:
        """Verdict as of the last step."""
        return self._fit.engine.verdict

    @property
    def actions(self) -> list[dict[str, Any]]:
        """What was done about instabilities, or would have been, oldest first."""
        return self._fit.actions.done

    def report(self) -> str:
        """Tell the run in a few sentences."""
        return self._fit.report()

    def release(self) -> None:
        """Give all learning rates back to the schedule, and do nothing more about instabilities in this run."""
        self._fit.actions.release()

    @property
    def state_key(self) -> str:
        """Key of this monitor's state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the detector's state, and what it was about, as plain Python values."""
        return self._fit.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. The first reading after it is a cold one."""
        self._fit.load_state_dict(state_dict)

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start afresh for a new fit."""
        if stage == "fit" and self._fit.begun:
            self._fit = self._new_fit()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the configuration, write the layout, and get lazy initialization out of the way."""
        self._fit.begun = True
        if self.enabled and os.environ.get("EOS_MONITOR", "").lower() != "off":
            # Of this fit: the monitor may have been in another Trainer with others.
            self.companions = [companion for companion in self.companions if companion in trainer.callbacks]
            self._fit.begin(trainer, pl_module, self.companions)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._fit.start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure, if this micro-batch opens an optimizer step at which a reading is due."""
        if self._fit.active:
            self._fit.before_batch(batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Read the learning rates that the step uses."""
        if self._fit.active:
            self._fit.before_optimizer_step(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the reading of this step, and take in its loss."""
        if self._fit.active:
            self._fit.after_batch(outputs)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take a last reading if there is none yet or the budget has room, and draw the figure."""
        if self._fit.active:
            self._fit.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Draw the figure of what there is."""
        if self._fit.active:
            self._fit.break_off()
