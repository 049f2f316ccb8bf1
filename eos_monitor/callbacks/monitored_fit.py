"""What a monitor does during one fit of a Trainer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from eos_monitor.alerts.alert import alert_of
from eos_monitor.alerts.throttle import Throttle
from eos_monitor.callbacks.clipping import clipped_edge_ratio
from eos_monitor.callbacks.losses import MeasuredLoss
from eos_monitor.callbacks.monitor_settings import MonitorSettings
from eos_monitor.callbacks.observer import Observer, Observers, WatchedFit
from eos_monitor.callbacks.outputs import RunOutputs
from eos_monitor.callbacks.pending_reading import PendingReading
from eos_monitor.callbacks.schedulers import TrainerSchedulers, steps_ahead
from eos_monitor.callbacks.step_gradient import StepGradient
from eos_monitor.callbacks.step_window import StepWindow, step_of
from eos_monitor.callbacks.trainer_gauge import TrainerGauge, first_double_backward
from eos_monitor.callbacks.wording import describe_optimizers, describe_stale, describe_start, edge_metrics, group_names
from eos_monitor.dashboard.loss_curve import LossCurve
from eos_monitor.forecast.lookahead import edge_ratio_at
from eos_monitor.forecast.tracked_reading import TrackedReading
from eos_monitor.isolation.parted_loss import told
from eos_monitor.isolation.twin import trained_parameters
from eos_monitor.limits.thresholds import learning_rates
from eos_monitor.monitor.engine import Engine
from eos_monitor.monitor.ranks import Ranks
from eos_monitor.readings.guard import ProcessLeftError
from eos_monitor.readings.reading import Measurement, StabilityReading
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.steps import StepBuffer, follows

WATCHING = "watching this fit"
_CARRYING = "carrying a reading to the settings of its step"
_BUFFERED = 16  # steps that are judged together where the budget sets the cadence
_Hook = TypeVar("_Hook", bound=Callable[..., None])


def _hook(method: _Hook) -> _Hook:
    """Let no failure of a hook reach the Trainer."""

    @functools.wraps(method)
    def guarded(self: MonitoredFit, *args: Any) -> None:
        if not self.active:
            return
        try:
            method(self, *args)
        except Exception as error:
            self._shut_down(error)

    return guarded  # type: ignore[return-value]


class MonitoredFit:
    """Measures and writes at the hooks of one fit.

    One optimizer step in time, with what observers do at each point (:class:`.Observer`)::

        hook of the Trainer         what happens
        --------------------------  -------------------------------------------------------------------------
        on_train_batch_start        the probe collects the batch; where it opens a step: the step before ends, a
                                    reading that has not been written is; observers answer to a change
                                    (before_step); if a reading is due it is measured, and observers measure
                                    beside it (measured, measure); they keep states (keep)
        (forward, backward)
        on_before_optimizer_step    once a step: observers decide on learning rates (before_update); settings and
                                    places of the parameters go into the step buffer; the pending reading is carried
                                    to the settings in effect (settle)
        (update, schedulers)
        on_train_batch_end          the loss goes into the step buffer; the step ends, and reaches the detector at
                                    once or with others; the pending reading is written (write)
        on_train_end                a last reading; the figure (finish)

    A failure that reaches a hook ends the watching, on all processes, and never the fit.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        folder: Its log folder.
        loss: The loss that is measured.
        settings: What the monitor was told.
        engine: Takes the readings.
        throttle: Decides which alerts go out.
        observers: What goes along.
        owner: The monitor, which knows its name; it is no part of the run that is verified.

    Attributes:
        active: Whether the fit is watched.
    """

    def __init__(
        self,
        trainer: Any,
        pl_module: Any,
        *,
        folder: Path | None,
        loss: MeasuredLoss,
        settings: MonitorSettings,
        engine: Engine,
        throttle: Throttle,
        observers: Sequence[Observer],
        owner: Any,
    ) -> None:
        self.engine = engine
        self.active = True
        self._trainer = trainer
        self._module = pl_module
        self._loss = loss
        self._optimizers = loss.optimizers
        self._settings = settings
        self._observers = Observers(observers)
        self._tracked = TrackedReading(None)
        self._losses = LossCurve()  # for the figure
        self._window: StepWindow | None = None
        self._pending: PendingReading | None = None
        self._introduced = False
        self._told_stale = False
        self._ending = False  # no row can be logged by the module any more
        self._outputs = RunOutputs(
            trainer, folder, settings.name, settings.alerts, engine.guard, throttle, silent=settings.silent
        )
        owner.tell_name(self._outputs.say)
        self._outputs.layout()
        engine.changed = self._announce
        engine.tell = self._outputs.say
        engine.expected_steps = steps_ahead(trainer)
        self._gauge = TrainerGauge(
            trainer,
            pl_module,
            loss=loss,
            settings=settings,
            engine=engine,
            observers=self._observers,
            say=self._outputs.say,
            owners=(owner, self),
        )
        several = told(loss.given, trainer.optimizers)
        if several is not None:
            self._outputs.say(several)
        with engine.schedule.own_time(startup=True):
            first_double_backward(pl_module.device)
        engine.follow(self._optimizers)
        self._step_gradient = StepGradient(trainer, pl_module, loss=loss, engine=engine, probe=settings.probe)
        self._schedulers = TrainerSchedulers(trainer, pl_module, self._optimizers, engine.guard)
        fit = WatchedFit(trainer, pl_module, self._optimizers, engine, self._outputs)
        self._observers.each(lambda observer: observer.begin(fit))
        self._steps = self._step_buffer()
        engine.schedule.begin(step_of(trainer))

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Training losses by step, thinned out in long runs."""
        return self._losses.points

    # ------------------------------------------------------------------ hooks

    @_hook
    def before_batch(self, batch: Any, batch_idx: int) -> None:
        """Measure, if this micro-batch opens an optimizer step at which a reading is due."""
        with self.engine.schedule.own_time():
            self._gauge.collect(batch, batch_idx)
            step = step_of(self._trainer)
            if self._window is None or self._window.step != step:
                self._open(StepWindow(step, batch_idx), batch)
            else:
                self._window.batch_idx = batch_idx
            self._step_gradient.before_batch(batch, read=self._pending is not None)

    @_hook
    def before_optimizer_step(self, optimizer: Any) -> None:
        """Read the learning rates that the step uses."""
        window = self._window
        if window is None:
            return
        with self.engine.schedule.own_time():
            if any(optimizer is measured for measured in self._optimizers):
                self._begin_update(window)
                self._step_gradient.stepping(optimizer)
                self._carry(window)
            self._observers.each(lambda observer: observer.before_optimizer_step(optimizer), together=True)

    @_hook
    def after_batch(self, outputs: Any) -> None:
        """Write the reading of this step, and take in its loss."""
        window = self._window
        if window is None:
            return
        with self.engine.schedule.own_time():
            window.batch_ended = True
            self._add_loss(outputs)
            if window.update_begun:
                window.update_begun = False
                self._steps.end(step_of(self._trainer))
            if self._pending is not None and self._pending.carried is not None:
                self._write(self._pending)

    @_hook
    def end(self) -> None:
        """Take a last reading if there is none yet or the budget has room, and draw the figure."""
        engine = self.engine
        step = step_of(self._trainer)
        self._ending = True
        with engine.schedule.own_time():
            self._write_leftover()
            self._steps.end(step)
            self._steps.flush()
            engine.samples.close()
            on_time = engine.due(step) if engine.schedule.every_n_steps else engine.affordable()
            possible = engine.ready() and engine.samples.kind != "batch"
            if possible and (on_time or not engine.readings):
                last = self._gauge.measure(None, step, lambda n: None)
                if last is not None:
                    self._take_in(last.measurement)
                    self._write(last)
        self._finish(step)

    @_hook
    def break_off(self) -> None:
        """Draw the figure of what there is."""
        if self.engine.ranks.size == 1 and self._window is not None:  # other processes may be gone
            self._steps.flush()
        self._finish(step_of(self._trainer))

    def _shut_down(self, error: Exception) -> None:
        """End the watching, here and on every other process."""
        ranks = self.engine.ranks
        self.active = False  # first of all: what follows can fail too
        if not isinstance(error, ProcessLeftError):
            ranks.leave()
        self.engine.guard.turn_off(WATCHING, f"{type(error).__name__}: {error}")
        self.engine.guard.run(WATCHING + " to its end", lambda: self._finish(step_of(self._trainer)))

    # ------------------------------------------------------------------ readings

    def _open(self, window: StepWindow, batch: Any) -> None:
        """Begin a step: end the one before, let observers answer, and measure if that is due."""
        if self._window is not None:
            self._steps.end(self._window.step)  # nothing, unless the optimizer was stepped behind Lightning's back
        self._write_leftover()
        self._window = window
        step = window.step
        self._track(self._observers.before_step(step, self._tracked))
        if self.engine.due(step):
            self._pending = self._gauge.measure(batch, step, lambda n: self._schedulers.after(n, window.batch_idx))
            if self._pending is not None:
                self._take_in(self._pending.measurement)
        self._observers.each(lambda observer: observer.keep(step, self._tracked))

    def _take_in(self, measurement: Measurement) -> None:
        self._track(TrackedReading(measurement, self._tracked))
        self._observers.each(lambda observer: observer.measured(measurement), together=True)

    def _carry(self, window: StepWindow) -> None:
        """Carry the pending reading to the settings of its step; the first optimizer of several does it for all."""
        pending = self._pending
        if pending is not None and pending.carried is None:
            measurement = pending.measurement
            carried = self.engine.guard.run(_CARRYING, lambda: self._carried(measurement, window), gives_up=False)
            pending.carry(carried)

    def _carried(self, measurement: Measurement, window: StepWindow) -> StabilityReading:
        """Return a reading at the settings that the step uses."""
        optimizers = self._optimizers
        settings = self._observers.ahead(self._schedulers.after(1, window.batch_idx))
        with self._observers.in_effect():
            reading = measurement.at(optimizers)
            if reading.stale and not measurement.reading.stale:
                why = describe_stale(measurement.reading, optimizers)
                reading = replace(reading, notes=(*reading.notes, why))
                if not self._told_stale:
                    self._told_stale = True
                    self._outputs.say(f"step {reading.step}: the reading does not move the verdict. {why}")
            self._observers.each(lambda observer: observer.settle(optimizers))
            return replace(
                reading,
                notes=self.engine.match.noted(reading.notes),
                edge_ratio_clipped=clipped_edge_ratio(self._trainer, optimizers, reading.edge_ratio),
                edge_ratio_next=edge_ratio_at(measurement, optimizers, settings),
            )

    def _write_leftover(self) -> None:
        """Write a reading whose step never came to its optimizer; drop one whose epoch was skipped."""
        if self._pending is not None and self._window is not None and self._window.batch_ended:
            self._write(self._pending)
        self._pending = None

    def _write(self, pending: PendingReading) -> None:
        self._pending = None
        reading = pending.reading
        self._steps.flush()
        verdict = self.engine.add_reading(reading, pending.beside_seconds)
        self._introduce(reading)
        row = self.engine.rows[-1]
        name = self._settings.name
        metrics = edge_metrics(name, row, int(verdict), group_names(self._optimizers))
        metrics |= self._observers.metrics(name)
        self._outputs.row(row, metrics)
        if self._settings.expose_metrics and not self._ending:  # no logging is possible once training has ended
            self._expose(metrics)
        self._observers.each(lambda observer: observer.write(reading.step, verdict))

    def _expose(self, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._module.log(
                key,
                value,
                logger=False,  # the row is written already
                prog_bar=key.endswith("edge_ratio"),
                on_step=True,
                on_epoch=False,
                batch_size=1,
            )

    def _introduce(self, reading: StabilityReading) -> None:
        if not self._introduced and reading.ready:
            self._introduced = True
            title = describe_optimizers(self._optimizers, [reading])
            self._outputs.say(f"{title}: {describe_start(self.engine, reading, self._loss.name)}")

    # ------------------------------------------------------------------ steps

    def _step_buffer(self) -> StepBuffer:
        engine = self.engine
        exact = engine.schedule.every_n_steps is not None  # whoever sets the cadence has set the cost
        params = trained_parameters(self._optimizers)
        return StepBuffer(
            params,
            self._add_step,
            movements=follows(self._settings.projections, params, exact=exact),
            max_overhead=engine.schedule.max_overhead,
            training_seconds=lambda: engine.schedule.training_seconds,
            buffered=1 if exact or self._observers.need_every_loss else _BUFFERED,
            processes=engine.ranks.size,
            sum_over_ranks=None if engine.ranks.sum is None else engine.ranks.met_sum,
            from_first=engine.ranks.from_first,
            tell=self._outputs.say,
            guard=engine.guard,
        )

    def _track(self, tracked: TrackedReading) -> None:
        """Go on from a reading, and project updates on its critical mode."""
        if tracked is not self._tracked:
            self._tracked = tracked
            self._steps.project_on(tracked.direction, trained_parameters(self._optimizers))

    def _begin_update(self, window: StepWindow) -> None:
        if window.update_begun:
            return
        window.update_begun = True
        optimizers = self._optimizers
        step = step_of(self._trainer)
        self._observers.each(lambda observer: observer.before_update(step, self._tracked), together=True)
        # The schedule is looked up by its own settings, and the step is taken with those in effect.
        ahead = self._observers.scaled(self._schedulers.highest_rate(window.batch_idx))
        with self._observers.in_effect():
            self._steps.begin(
                step,
                lambda: {
                    "lr": learning_rates(optimizers),
                    "lr_ahead": ahead,
                    "edge_ratio": self._tracked.edge_ratio(optimizers),
                },
            )

    def _add_loss(self, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning hands out the loss divided by the number of accumulated batches.
            automatic = self._module.automatic_optimization
            self._steps.add_loss(loss, float(self._trainer.accumulate_grad_batches) if automatic else 1.0)

    def _add_step(self, step: int, **inputs: Any) -> None:
        loss = inputs.get("loss")
        if loss is not None and math.isfinite(loss):
            self._losses.add(step, loss)
        self.engine.add_step(step, **inputs)

    # ------------------------------------------------------------------ what follows from them

    def _announce(self, change: Change) -> None:
        readings = self.engine.readings
        self._outputs.alert(alert_of(change, readings[-1] if readings else None))
        self._observers.each(lambda observer: observer.changed(change), together=True)

    def _finish(self, step: int) -> None:
        engine = self.engine
        self.active = False
        engine.ranks = Ranks()
        engine.schedule.end()
        self._observers.each(lambda observer: observer.finish(step))
        self._outputs.finish(engine, step, self.losses, describe_optimizers(self._optimizers, engine.readings))
