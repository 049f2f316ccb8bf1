"""The monitor for Lightning."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from eos_monitor.alerts.alert import alert_of
from eos_monitor.alerts.sinks import Sink, check_alerts
from eos_monitor.alerts.throttle import Throttle
from eos_monitor.callbacks._compat import Callback
from eos_monitor.callbacks.actions import Actions
from eos_monitor.callbacks.clipping import clipped_edge_ratio
from eos_monitor.callbacks.look_ahead import LookAhead
from eos_monitor.callbacks.losses import resolve_loss
from eos_monitor.callbacks.occasion import Occasion
from eos_monitor.callbacks.outputs import (
    RunOutputs,
    describe_optimizers,
    describe_threshold,
    edge_metrics,
    group_names,
)
from eos_monitor.callbacks.ranks import ranks_of, unsupported
from eos_monitor.callbacks.trainer_sandbox import TrainerSandbox
from eos_monitor.callbacks.verification import Verification, run_fingerprint
from eos_monitor.curvature.fingerprint import Fingerprint
from eos_monitor.curvature.twin import trained_parameters
from eos_monitor.dashboard.report import run_report
from eos_monitor.stability.detector import Verdict
from eos_monitor.stability.engine import Change, Engine, Ranks
from eos_monitor.stability.followed import Followed
from eos_monitor.stability.gauge import Gauge
from eos_monitor.stability.lookahead import edge_ratio_at
from eos_monitor.stability.reading import Measurement, StabilityReading
from eos_monitor.stability.steps import Steps
from eos_monitor.stability.thresholds import learning_rates

if TYPE_CHECKING:
    from eos_monitor.callbacks.companion import Companion

_LOT = 16  # steps that are judged together where the budget sets the cadence
_LOSS_POINTS = 4000  # kept for the figure; thinned out beyond


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

    _begun: bool  # whether the present step is under way

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
        self._loss_fn, self._alerts, self._full_batch = loss_fn, tuple(alerts), full_batch
        self._verify, self._expose, self._cooldown = verify, expose_metrics, alert_cooldown
        self._projections = projections
        self._make_actions = partial(
            Actions,
            tuple(actions) if not isinstance(actions, str) else actions,
            dry_run=dry_run,
            target=edge_target,
            floor=lr_floor,
            cooldown=action_cooldown,
            snapshot_every=snapshot_every,
        )
        shared: dict[str, Any] = {"batch_size_fn": batch_size_fn, "seed": seed}
        self._gauge_settings = shared | {
            "k": k,
            "rtol": rtol,
            "max_matvecs": max_matvecs,
            "method": method,
            "raw_sharpness": raw_sharpness,
        }
        self._engine_settings = shared | {
            "every_n_steps": every_n_steps,
            "max_overhead": max_overhead,
            "probe": probe,
            "probe_samples": probe_samples,
        }
        self.companions: list[Companion] = []  # monitors that measure on the same occasions
        self._watched: list[list[Any]] = []
        self._watched_before: list[list[Any]] | None = None
        self._pending: Measurement | None = None
        self._finished: StabilityReading | None = None
        self._reset()

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

    def report(self) -> str:
        """Tell the run in a few sentences."""
        changes = [(step, verdict.name) for step, verdict in self._engine.verdicts]
        engine = self._engine
        return run_report(
            engine.rows,
            changes,
            engine.schedule.overhead,
            last_step=engine.last_step,
            reason=engine.detector.reason,
        )

    @property
    def actions(self) -> list[dict[str, Any]]:
        """What was done about instabilities, or would have been, oldest first."""
        return self._actions.done

    def release(self) -> None:
        """Give all learning rates back to the schedule, and do nothing more about instabilities in this run."""
        self._actions.release()

    @property
    def state_key(self) -> str:
        """Key of this monitor's state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the detector's state, and what it was about, as plain Python values."""
        return {
            "detector": self._engine.detector.state_dict(),
            "watched": self._watched,
            "alerts": self._throttle.state_dict(),
            "actions": self._actions.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. The first reading after it is a cold one."""
        self._engine.detector.load_state_dict(state_dict["detector"])
        self._watched_before = state_dict["watched"]
        self._throttle.load_state_dict(state_dict["alerts"])
        self._actions.load_state_dict(state_dict["actions"])

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start afresh for a new fit."""
        if stage == "fit" and self._used:
            self._reset()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the configuration, write the layout, and get lazy initialization out of the way."""
        self._used, self._active = True, False
        if not self.enabled or os.environ.get("EOS_MONITOR", "").lower() == "off":
            return
        why_not = unsupported(trainer)
        if why_not:
            self._engine.turn_off(why_not)
            return
        if trainer.world_size > 1:
            self._engine.ranks = ranks_of(trainer)
            self._engine.samples.share(trainer.world_size)
        self._loss, self._loss_source = resolve_loss(self._loss_fn, pl_module)
        self._outputs = self._open_outputs(trainer)
        self._outputs.layout()
        self._engine.changed = self._announce
        # Of this fit: the monitor may have been in another Trainer with others.
        self.companions = [companion for companion in self.companions if companion in trainer.callbacks]
        for companion in self.companions:
            companion.begin_with(trainer)
        self._active = True
        with self._engine.schedule.own_time(startup=True):
            _first_double_backward(pl_module.device)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._window: int | None = None
        self._title = describe_optimizers(trainer.optimizers)
        self._watched = [
            [type(optimizer).__name__, sum(p.numel() for group in optimizer.param_groups for p in group["params"])]
            for optimizer in trainer.optimizers
        ]
        if self._active and self._watched_before and self._watched_before != self._watched:
            self._engine.warn_once(
                "resumed",
                f"eos_monitor: the run that this one goes on from trained {self._watched_before} (optimizer, number of "
                f"parameters), this one {self._watched}; its verdict starts afresh.",
            )
            self._engine.forget_verdict()
        self._watched_before = None
        if self._active:
            self._engine.follow(trainer.optimizers)
            self._ahead = LookAhead(trainer, pl_module)
            self._steps = self._follow_steps(trainer)
            self._actions.begin(trainer, pl_module, self._engine, self._outputs)
        self._engine.schedule.begin(_step(trainer))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure, if this micro-batch opens an optimizer step at which a reading is due."""
        if not self._active:
            return
        with self._engine.schedule.own_time():
            self._collect(trainer, batch, batch_idx)
            self._batch_idx = batch_idx
            step = _step(trainer)
            if step == self._window:
                return
            if self._window is not None:
                self._steps.end(self._window)  # nothing, unless the optimizer was stepped behind Lightning's back
            self._window = step
            self._write_leftover(trainer)
            self._act(trainer, step)
            if self._engine.due(step):
                self._pending = self._measure(trainer, pl_module, batch, step)
            self._actions.keep(step, self._followed)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Read the learning rates that the step uses."""
        if not self._active:
            return
        with self._engine.schedule.own_time():
            self._begin_step(trainer)
            if self._pending is not None and self._finished is None:
                settings = self._actions.ahead(self._ahead.after(1, self._batch_idx))
                with self._actions.in_effect():
                    reading = self._pending.at(trainer.optimizers)
                    self._finished = replace(
                        reading,
                        edge_ratio_clipped=clipped_edge_ratio(trainer, reading.edge_ratio),
                        edge_ratio_next=edge_ratio_at(self._pending, trainer.optimizers, settings),
                    )
                    for companion in self.companions:
                        companion.guard(partial(companion.settle, trainer.optimizers))
            self._actions.now(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the reading of this step, and take in its loss."""
        if not self._active:
            return
        with self._engine.schedule.own_time():
            self._batch_ended = True
            self._collect_loss(trainer, pl_module, outputs)
            if self._begun:
                self._begun = False
                self._steps.end(_step(trainer))
            if self._finished is not None:
                self._write(trainer, self._finished)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take a last reading if there is none yet or the budget has room, and draw the figure."""
        if not self._active:
            return
        engine, step, self._ending = self._engine, _step(trainer), True
        with engine.schedule.own_time():
            self._write_leftover(trainer)
            self._steps.end(step)
            self._steps.flush()
            engine.samples.close()
            on_time = engine.due(step) if engine.schedule.every_n_steps else engine.affordable()
            possible = engine.ready() and engine.samples.kind != "batch"
            if possible and (on_time or not engine.readings):
                measurement = self._measure(trainer, pl_module, None, step)
                if measurement is not None:
                    self._write(trainer, measurement.reading)
        self._finish(step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Draw the figure of what there is."""
        if self._active:
            if self._engine.ranks.size == 1 and "_steps" in vars(self):  # other processes may be gone
                self._steps.flush()
            self._finish(_step(trainer))

    # ------------------------------------------------------------------ inside

    def _reset(self) -> None:
        self._throttle = Throttle(self._cooldown)
        self._actions = self._make_actions()
        self._engine = Engine(Gauge(**self._gauge_settings), **self._engine_settings)
        self._verification = Verification(self._verify)
        self._used = self._active = self._batch_ended = self._introduced = self._ending = False
        self._begun = False
        self._pending = self._finished = None
        self._followed = Followed(None)
        self._companions_seconds = 0.0
        self._watched = []
        self._losses: list[tuple[int, float]] = []

    def _collect(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        samples = self._engine.samples
        if not samples.full:
            if trainer.current_epoch > 0 and batch_idx == 0:
                samples.close()  # the first epoch had fewer samples than were asked for
            self._engine.collect(batch)
            if batch_idx + 1 >= trainer.num_training_batches:
                samples.close()

    def _measure(self, trainer: Any, pl_module: Any, batch: Any, step: int) -> Measurement | None:
        def measure() -> Measurement | None:
            measurement = self._engine.measure(
                pl_module,
                self._loss,
                trainer.optimizers,
                step=step,
                batch=batch,
                full_batch=self._is_full_batch(trainer),
                accumulate=trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1,
                sandbox=TrainerSandbox(trainer, pl_module),
            )
            if measurement is not None:
                self._companions_measure(trainer, pl_module, batch, step, measurement)
                self._followed = Followed(measurement, self._followed)
                self._actions.measured(measurement)
                self._steps.aim(self._followed.direction, trained_parameters(trainer.optimizers))
            return measurement

        def look() -> Fingerprint:
            return run_fingerprint(trainer, pl_module, leave_out=self)

        def measure_in_effect() -> Measurement | None:
            with self._actions.in_effect():
                return measure()

        return self._verification.around(look, self._engine, self._outputs.say, measure_in_effect)

    def _companions_measure(
        self, trainer: Any, pl_module: Any, batch: Any, step: int, measurement: Measurement
    ) -> None:
        self._companions_seconds = 0.0
        if not measurement.reading.ready or self._engine.off is not None:
            return  # no reading that is charged, or written
        began = time.perf_counter()
        for companion in self.companions:
            companion.take_part(
                Occasion(
                    trainer=trainer,
                    pl_module=pl_module,
                    loss_fn=self._loss,
                    batches=self._engine.samples.on(pl_module.device, batch),
                    step=step,
                    measurement=measurement,
                    modes=self._engine.eigenvectors,
                    verdict=self._engine.verdict,
                    # After the last step there is none that a schedule could be for.
                    ahead=lambda n: None if self._ending else self._ahead.after(n, self._batch_idx),
                )
            )
        # Around every reading the time is that of the whole occasion already.
        if self._verify != "always":
            self._companions_seconds = time.perf_counter() - began

    def _open_outputs(self, trainer: Any) -> RunOutputs:
        return RunOutputs(trainer, self.name, self._alerts, self._engine.warn_once, self._throttle)

    def _is_full_batch(self, trainer: Any) -> bool:
        if self._full_batch is not None:
            return self._full_batch
        samples, batches = self._engine.samples, trainer.num_training_batches
        one_step_an_epoch = batches == 1 or trainer.accumulate_grad_batches >= batches
        if samples.kind == "batch":
            return bool(batches == 1)
        return bool(one_step_an_epoch and samples.kind == "fixed" and samples.seen == batches and samples.whole)

    def _write_leftover(self, trainer: Any) -> None:
        """Write a reading whose step never came to its optimizer; drop one whose epoch was skipped."""
        if self._pending is not None and self._batch_ended:
            self._write(trainer, self._pending.reading)
        self._pending = self._finished = None
        self._batch_ended = False

    def _write(self, trainer: Any, reading: StabilityReading) -> None:
        self._pending = self._finished = None
        self._steps.flush()
        verdict = self._engine.take(reading, self._companions_seconds)
        self._introduce(reading)
        row = self._engine.rows[-1]
        metrics = edge_metrics(self.name, row, int(verdict), group_names(trainer.optimizers))
        if self._actions.factors:
            metrics[f"{self.name}/lr_factor"] = min(self._actions.factors)
        self._outputs.row(row, metrics)
        if self._expose and not self._ending:  # no logging is possible once training has ended
            for key, value in metrics.items():
                # No logger: the row is written already.
                trainer.lightning_module.log(
                    key,
                    value,
                    logger=False,
                    prog_bar=key.endswith("edge_ratio"),
                    on_step=True,
                    on_epoch=False,
                    batch_size=1,
                )
        for companion in self.companions:
            companion.guard(partial(companion.write, reading.step, verdict))

    def _introduce(self, reading: StabilityReading) -> None:
        if self._introduced or not reading.ready:
            return
        self._introduced = True
        schedule = self._engine.schedule
        if schedule.every_n_steps is not None:
            cadence = f"one every {schedule.every_n_steps} steps"
        else:
            seconds = schedule.predicted_cost / schedule.max_overhead
            cadence = f"one about every {seconds:.2g} s of training ({schedule.max_overhead:.0%} of the time)"
        processes = f" of each of {self._engine.ranks.size} processes" if self._engine.ranks.size > 1 else ""
        probe = self._engine.samples.describe() + processes
        self._outputs.say(
            f"{self._title}: {describe_threshold(reading)}; loss from {self._loss_source}; probe: {probe}; "
            f"first reading {reading.seconds:.2g} s ({reading.matvecs} products), then {cadence}; start-up "
            f"{schedule.startup:.2g} s"
        )

    def _announce(self, change: Change) -> None:
        self._actions.noticed(change)
        self._outputs.alert(alert_of(change, self.readings[-1] if self.readings else None))
        for companion in self.companions:
            companion.guard(partial(companion.changed, change))

    def _follow_steps(self, trainer: Any) -> Steps:
        engine = self._engine
        exact = engine.schedule.every_n_steps is not None  # whoever sets the cadence has set the cost
        return Steps(
            trained_parameters(trainer.optimizers),
            self._take_step,
            movements=True if self._projections is None and exact else self._projections,
            max_overhead=engine.schedule.max_overhead,
            training_seconds=lambda: engine.schedule.training_seconds,
            lot=1 if exact or self._actions.names else _LOT,
            processes=engine.ranks.size,
            sum_over_ranks=engine.ranks.sum,
            from_first=engine.ranks.from_first,
            tell=self._outputs.say,
        )

    def _take_step(self, step: int, **inputs: Any) -> None:
        loss = inputs.get("loss")
        if loss is not None and math.isfinite(loss):
            self._losses.append((step, loss))
            if len(self._losses) > _LOSS_POINTS:
                self._losses = self._losses[::2]
        self._engine.take_step(step, **inputs)

    def _begin_step(self, trainer: Any) -> None:
        if not self._begun:
            self._begun = True
            self._actions.before_update(_step(trainer), self._followed)
            # The schedule is looked up by its own settings, and the step is taken with those in effect.
            ahead = self._ahead.highest_rate(self._batch_idx)
            if ahead is not None and self._actions.factors:
                ahead *= self._actions.factors[0]
            with self._actions.in_effect():
                self._steps.begin(
                    _step(trainer),
                    lambda: {
                        "lr": learning_rates(trainer.optimizers),
                        "lr_ahead": ahead,
                        "edge_ratio": self._followed.edge_ratio(trainer.optimizers),
                    },
                )

    def _act(self, trainer: Any, step: int) -> None:
        followed = self._actions.before_step(step, self._followed)
        if followed is not self._followed:
            self._followed = followed
            self._steps.aim(followed.direction, trained_parameters(trainer.optimizers))

    def _collect_loss(self, trainer: Any, pl_module: Any, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning hands out the loss divided by the number of accumulated batches.
            self._steps.loss(loss, float(trainer.accumulate_grad_batches) if pl_module.automatic_optimization else 1.0)

    def _finish(self, step: int) -> None:
        engine = self._engine
        self._actions.end()
        self._active, engine.ranks = False, Ranks()
        engine.schedule.end()
        for companion in self.companions:
            companion.guard(partial(companion.finish, step))
        if not engine.rows:
            return
        # Between readings too: a verdict may have come from a loss alone.
        verdicts = [*engine.verdicts, (step, engine.verdict)]
        timeline = [*engine.rows, *({"step": at, "verdict": verdict.name} for at, verdict in verdicts)]
        began = time.perf_counter()
        path = self._outputs.figure(sorted(timeline, key=lambda row: int(row["step"])), self._losses, self._title)
        figure = f" Figure ({time.perf_counter() - began:.2g} s): {path}" if path else ""
        self._outputs.close_alerts()
        self._outputs.say(self.report().replace("\n", " ") + figure)


def _step(trainer: Any) -> int:
    """Return the step that Lightning logs under: optimizer-step windows since the start."""
    step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if step is None else step)


def _first_double_backward(device: torch.device) -> None:
    """Pay autograd's lazy initialization now, so that it is not charged to the first reading."""
    with torch.inference_mode(False), torch.enable_grad():
        w = torch.zeros(2, 2, device=device, requires_grad=True)
        loss = nn.functional.linear(torch.ones(1, 2, device=device), w).tanh().square().sum()
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        torch.autograd.grad(gradient.sum(), w)
