"""What a monitor does during one fit of a Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eos_monitor.alerts.alert import alert_of
from eos_monitor.alerts.sinks import Sink
from eos_monitor.alerts.throttle import Throttle
from eos_monitor.callbacks.actions import Actions
from eos_monitor.callbacks.clipping import clipped_edge_ratio
from eos_monitor.callbacks.losses import resolve_loss
from eos_monitor.callbacks.outputs import (
    RunOutputs,
    describe_optimizers,
    describe_threshold,
    edge_metrics,
    group_names,
)
from eos_monitor.callbacks.ranks import ranks_of, unsupported
from eos_monitor.callbacks.reading_context import ReadingContext
from eos_monitor.callbacks.schedulers import TrainerSchedulers
from eos_monitor.callbacks.trainer_sandbox import TrainerSandbox
from eos_monitor.callbacks.verification import Verification, run_fingerprint
from eos_monitor.dashboard.report import run_report
from eos_monitor.forecast.lookahead import edge_ratio_at
from eos_monitor.forecast.tracked_reading import TrackedReading
from eos_monitor.isolation.fingerprint import Fingerprint
from eos_monitor.isolation.twin import trained_parameters
from eos_monitor.limits.thresholds import learning_rates
from eos_monitor.monitor.engine import Engine, Ranks
from eos_monitor.readings.reading import Measurement, StabilityReading
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.steps import StepBuffer

if TYPE_CHECKING:
    from eos_monitor.callbacks.attached_monitor import AttachedMonitor

_LOT = 16  # steps that are judged together where the budget sets the cadence
_LOSS_POINTS = 4000  # kept for the figure; thinned out beyond


@dataclass(frozen=True)
class FitSettings:
    """What an :class:`EdgeOfStabilityMonitor` was told that its engine and its actions need not know.

    Attributes:
        name: As the monitor's, like all that follow.
        loss_fn: The loss.
        alerts: What to do on a change of verdict.
        expose_metrics: Whether to put the numbers into ``callback_metrics``.
        verify: When to verify.
        full_batch: Whether the probe is all the data.
        alert_cooldown: Seconds.
        projections: Whether to follow updates.
        silent: Write nothing: the companions of the monitor do.
    """

    name: str
    loss_fn: Callable[[Any, Any], Tensor] | None
    alerts: tuple[str | Sink, ...]
    expose_metrics: bool
    verify: str | bool
    full_batch: bool | None
    alert_cooldown: float
    projections: bool | None
    silent: bool = False


class MonitoredFit:
    """Measures, writes and acts at the hooks of one fit.

    Args:
        settings: What the monitor was told.
        engine: Takes the readings.
        actions: What is done about an instability.
        owner: The monitor; it is no part of the run that is verified.

    Attributes:
        losses: Training losses by step, for the figure.
        begun: Whether the fit has begun.
        active: Whether it is followed.
    """

    def __init__(self, settings: FitSettings, engine: Engine, actions: Actions, owner: Any) -> None:
        self.engine, self.actions = engine, actions
        self.losses: list[tuple[int, float]] = []
        self.begun = self.active = False
        self._settings, self._owner = settings, owner
        self._throttle = Throttle(settings.alert_cooldown)
        self._verification = Verification(settings.verify)
        self._companions: list[AttachedMonitor] = []
        self._companions_seconds = 0.0
        self._followed = TrackedReading(None)
        self._window: int | None = None  # the present step, once a batch has begun
        self._pending: Measurement | None = None  # taken before the present step
        self._finished: StabilityReading | None = None  # it, at the settings that the step uses
        self._step_begun = self._batch_ended = self._introduced = self._ending = False
        self._trained: list[list[Any]] = []  # type of each optimizer, and how many parameters it trains
        self._trained_before: list[list[Any]] | None = None

    def report(self) -> str:
        """Tell the run in a few sentences."""
        engine = self.engine
        return run_report(
            engine.rows,
            [(step, verdict.name) for step, verdict in engine.verdicts],
            engine.schedule.overhead,
            last_step=engine.last_step,
            reason=engine.detector.reason,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the detector's state, and what it was about, as plain Python values."""
        return {
            "detector": self.engine.detector.state_dict(),
            "watched": self._trained,
            "alerts": self._throttle.state_dict(),
            "actions": self.actions.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. The first reading after it is a cold one."""
        self.engine.detector.load_state_dict(state["detector"])
        self._trained_before = state["watched"]
        self._throttle.load_state_dict(state["alerts"])
        self.actions.load_state_dict(state["actions"])

    # ------------------------------------------------------------------ hooks

    def begin(self, trainer: Any, pl_module: Any, companions: Sequence[AttachedMonitor]) -> None:
        """Check the configuration, write the layout, and get lazy initialization out of the way."""
        why_not = unsupported(trainer)
        if why_not:
            self.engine.turn_off(why_not)
            return
        self._trainer, self._module, self._companions = trainer, pl_module, list(companions)
        if trainer.world_size > 1:
            self.engine.ranks = ranks_of(trainer)
            self.engine.samples.share(trainer.world_size)
        settings = self._settings
        self._loss, self._loss_source = resolve_loss(settings.loss_fn, pl_module)
        self._outputs = RunOutputs(
            trainer, settings.name, settings.alerts, self.engine.warn_once, self._throttle, silent=settings.silent
        )
        self._outputs.layout()
        self.engine.changed = self._announce
        for companion in self._companions:
            companion.begin_with(trainer)
        self.active = True
        with self.engine.schedule.own_time(startup=True):
            _first_double_backward(pl_module.device)

    def start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._trained = [
            [type(optimizer).__name__, sum(p.numel() for group in optimizer.param_groups for p in group["params"])]
            for optimizer in trainer.optimizers
        ]
        if self.active:
            self._title = describe_optimizers(trainer.optimizers)
            if self._trained_before and self._trained_before != self._trained:
                self.engine.warn_once(
                    "resumed",
                    f"eos_monitor: the run that this one goes on from trained {self._trained_before} (optimizer, "
                    f"number of parameters), this one {self._trained}; its verdict starts afresh.",
                )
                self.engine.forget_verdict()
            self.engine.follow(trainer.optimizers)
            self._ahead = TrainerSchedulers(trainer, pl_module)
            self._steps = self._follow_steps()
            self.actions.begin(trainer, pl_module, self.engine, self._outputs)
        self._trained_before = None
        self.engine.schedule.begin(_step(trainer))

    def before_batch(self, batch: Any, batch_idx: int) -> None:
        """Measure, if this micro-batch opens an optimizer step at which a reading is due."""
        with self.engine.schedule.own_time():
            self._collect(batch, batch_idx)
            self._batch_idx = batch_idx
            step = _step(self._trainer)
            if step == self._window:
                return
            if self._window is not None:
                self._steps.end(self._window)  # nothing, unless the optimizer was stepped behind Lightning's back
            self._window = step
            self._write_leftover()
            self._act(step)
            if self.engine.due(step):
                self._pending = self._measure(batch, step)
            self.actions.keep(step, self._followed)

    def before_optimizer_step(self, optimizer: Any) -> None:
        """Read the learning rates that the step uses."""
        with self.engine.schedule.own_time():
            self._begin_step()
            if self._pending is not None and self._finished is None:
                pending = self._pending
                finished = self.engine.attempt(lambda: self._finish_reading(pending))
                self._finished = finished or replace(pending.reading, stale=True)
            self.actions.now(optimizer)

    def after_batch(self, outputs: Any) -> None:
        """Write the reading of this step, and take in its loss."""
        with self.engine.schedule.own_time():
            self._batch_ended = True
            self._collect_loss(outputs)
            if self._step_begun:
                self._step_begun = False
                self._steps.end(_step(self._trainer))
            if self._finished is not None:
                self._write(self._finished)

    def end(self) -> None:
        """Take a last reading if there is none yet or the budget has room, and draw the figure."""
        engine, step, self._ending = self.engine, _step(self._trainer), True
        with engine.schedule.own_time():
            self._write_leftover()
            self._steps.end(step)
            self._steps.flush()
            engine.samples.close()
            on_time = engine.due(step) if engine.schedule.every_n_steps else engine.affordable()
            possible = engine.ready() and engine.samples.kind != "batch"
            if possible and (on_time or not engine.readings):
                measurement = self._measure(None, step)
                if measurement is not None:
                    self._write(measurement.reading)
        self._finish(step)

    def break_off(self) -> None:
        """Draw the figure of what there is."""
        if self.engine.ranks.size == 1 and self._window is not None:  # other processes may be gone
            self._steps.flush()
        self._finish(_step(self._trainer))

    # ------------------------------------------------------------------ readings

    def _collect(self, batch: Any, batch_idx: int) -> None:
        samples = self.engine.samples
        if not samples.full:
            if self._trainer.current_epoch > 0 and batch_idx == 0:
                samples.close()  # the first epoch had fewer samples than were asked for
            self.engine.collect(batch)
            if batch_idx + 1 >= self._trainer.num_training_batches:
                samples.close()

    def _measure(self, batch: Any, step: int) -> Measurement | None:
        trainer, module = self._trainer, self._module

        def look() -> Fingerprint:
            return run_fingerprint(trainer, module, leave_out=(self._owner, self))

        def measure() -> Measurement | None:
            with self.actions.in_effect():
                measurement = self.engine.measure(
                    module,
                    self._loss,
                    trainer.optimizers,
                    step=step,
                    batch=batch,
                    full_batch=self._is_full_batch(),
                    accumulate=trainer.accumulate_grad_batches if module.automatic_optimization else 1,
                    sandbox=TrainerSandbox(trainer, module),
                )
                if measurement is not None:
                    self._companions_measure(batch, step, measurement)
                    self._followed = TrackedReading(measurement, self._followed)
                    self.actions.measured(measurement)
                    self._aim()
                return measurement

        return self._verification.around(look, self.engine, self._outputs.say, measure)

    def _companions_measure(self, batch: Any, step: int, measurement: Measurement) -> None:
        self._companions_seconds = 0.0
        if not measurement.reading.ready or self.engine.off is not None:
            return  # no reading that is charged, or written
        began = time.perf_counter()
        for companion in self._companions:
            companion.take_part(
                ReadingContext(
                    trainer=self._trainer,
                    pl_module=self._module,
                    loss_fn=self._loss,
                    batches=self.engine.samples.on(self._module.device, batch),
                    step=step,
                    measurement=measurement,
                    modes=self.engine.eigenvectors,
                    verdict=self.engine.verdict,
                    # After the last step there is none that a schedule could be for.
                    ahead=lambda n: None if self._ending else self._ahead.after(n, self._batch_idx),
                )
            )
        # Around every reading the time is that of the whole occasion already.
        if self._settings.verify != "always":
            self._companions_seconds = time.perf_counter() - began

    def _is_full_batch(self) -> bool:
        if self._settings.full_batch is not None:
            return self._settings.full_batch
        samples, batches = self.engine.samples, self._trainer.num_training_batches
        one_step_an_epoch = batches == 1 or self._trainer.accumulate_grad_batches >= batches
        if samples.kind == "batch":
            return bool(batches == 1)
        return bool(one_step_an_epoch and samples.kind == "fixed" and samples.seen == batches and samples.whole)

    def _finish_reading(self, pending: Measurement) -> StabilityReading:
        """Return the reading at the settings that the step uses."""
        trainer = self._trainer
        settings = self.actions.ahead(self._ahead.after(1, self._batch_idx))
        with self.actions.in_effect():
            reading = pending.at(trainer.optimizers)
            for companion in self._companions:
                companion.guard(partial(companion.settle, trainer.optimizers))
            return replace(
                reading,
                edge_ratio_clipped=clipped_edge_ratio(trainer, reading.edge_ratio),
                edge_ratio_next=edge_ratio_at(pending, trainer.optimizers, settings),
            )

    def _write_leftover(self) -> None:
        """Write a reading whose step never came to its optimizer; drop one whose epoch was skipped."""
        if self._pending is not None and self._batch_ended:
            self._write(self._pending.reading)
        self._pending = self._finished = None
        self._batch_ended = False

    def _write(self, reading: StabilityReading) -> None:
        self._pending = self._finished = None
        self._steps.flush()
        verdict = self.engine.take(reading, self._companions_seconds)
        self._introduce(reading)
        row, name = self.engine.rows[-1], self._settings.name
        metrics = edge_metrics(name, row, int(verdict), group_names(self._trainer.optimizers))
        if self.actions.factors:
            metrics[f"{name}/lr_factor"] = min(self.actions.factors)
        self._outputs.row(row, metrics)
        if self._settings.expose_metrics and not self._ending:  # no logging is possible once training has ended
            for key, value in metrics.items():
                # No logger: the row is written already.
                self._module.log(
                    key,
                    value,
                    logger=False,
                    prog_bar=key.endswith("edge_ratio"),
                    on_step=True,
                    on_epoch=False,
                    batch_size=1,
                )
        for companion in self._companions:
            companion.guard(partial(companion.write, reading.step, verdict))

    def _introduce(self, reading: StabilityReading) -> None:
        if self._introduced or not reading.ready:
            return
        self._introduced = True
        schedule = self.engine.schedule
        if schedule.every_n_steps is not None:
            cadence = f"one every {schedule.every_n_steps} steps"
        else:
            seconds = schedule.predicted_cost / schedule.max_overhead
            cadence = f"one about every {seconds:.2g} s of training ({schedule.max_overhead:.0%} of the time)"
        processes = f" of each of {self.engine.ranks.size} processes" if self.engine.ranks.size > 1 else ""
        probe = self.engine.samples.describe() + processes
        self._outputs.say(
            f"{self._title}: {describe_threshold(reading)}; loss from {self._loss_source}; probe: {probe}; "
            f"first reading {reading.seconds:.2g} s ({reading.matvecs} products), then {cadence}; start-up "
            f"{schedule.startup:.2g} s"
        )

    # ------------------------------------------------------------------ steps

    def _follow_steps(self) -> StepBuffer:
        engine, projections = self.engine, self._settings.projections
        exact = engine.schedule.every_n_steps is not None  # whoever sets the cadence has set the cost
        return StepBuffer(
            trained_parameters(self._trainer.optimizers),
            self._take_step,
            movements=True if projections is None and exact else projections,
            max_overhead=engine.schedule.max_overhead,
            training_seconds=lambda: engine.schedule.training_seconds,
            lot=1 if exact or self.actions.names else _LOT,
            processes=engine.ranks.size,
            sum_over_ranks=engine.ranks.sum,
            from_first=engine.ranks.from_first,
            tell=self._outputs.say,
        )

    def _aim(self) -> None:
        """Project updates on the critical mode that is followed now."""
        self._steps.aim(self._followed.direction, trained_parameters(self._trainer.optimizers))

    def _begin_step(self) -> None:
        if self._step_begun:
            return
        self._step_begun = True
        trainer, step = self._trainer, _step(self._trainer)
        self.actions.before_update(step, self._followed)
        # The schedule is looked up by its own settings, and the step is taken with those in effect.
        ahead = self._ahead.highest_rate(self._batch_idx)
        if ahead is not None and self.actions.factors:
            ahead *= self.actions.factors[0]
        with self.actions.in_effect():
            self._steps.begin(
                step,
                lambda: {
                    "lr": learning_rates(trainer.optimizers),
                    "lr_ahead": ahead,
                    "edge_ratio": self._followed.edge_ratio(trainer.optimizers),
                },
            )

    def _collect_loss(self, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning hands out the loss divided by the number of accumulated batches.
            automatic = self._module.automatic_optimization
            self._steps.loss(loss, float(self._trainer.accumulate_grad_batches) if automatic else 1.0)

    def _take_step(self, step: int, **inputs: Any) -> None:
        loss = inputs.get("loss")
        if loss is not None and math.isfinite(loss):
            self.losses.append((step, loss))
            if len(self.losses) > _LOSS_POINTS:
                self.losses = self.losses[::2]
        self.engine.take_step(step, **inputs)

    # ------------------------------------------------------------------ what follows from them

    def _act(self, step: int) -> None:
        followed = self.actions.before_step(step, self._followed)
        if followed is not self._followed:
            self._followed = followed
            self._aim()

    def _announce(self, change: Change) -> None:
        self.actions.noticed(change)
        readings = self.engine.readings
        self._outputs.alert(alert_of(change, readings[-1] if readings else None))
        for companion in self._companions:
            companion.guard(partial(companion.changed, change))

    def _finish(self, step: int) -> None:
        engine = self.engine
        self.actions.end()
        self.active, engine.ranks = False, Ranks()
        engine.schedule.end()
        for companion in self._companions:
            companion.guard(partial(companion.finish, step))
        if not engine.rows:
            return
        # Between readings too: a verdict may have come from a loss alone.
        verdicts = [*engine.verdicts, (step, engine.verdict)]
        timeline = [*engine.rows, *({"step": at, "verdict": verdict.name} for at, verdict in verdicts)]
        began = time.perf_counter()
        path = self._outputs.figure(sorted(timeline, key=lambda row: int(row["step"])), self.losses, self._title)
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
