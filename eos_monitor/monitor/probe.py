"""The monitor for a plain PyTorch loop."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.alerts.alert import alert_of
from eos_monitor.alerts.sinks import Sink, check_alerts, sinks_of
from eos_monitor.alerts.throttle import Throttle
from eos_monitor.forecast.lookahead import Position, SettingsAhead, edge_ratio_at, scheduled
from eos_monitor.forecast.tracked_reading import TrackedReading
from eos_monitor.isolation.fingerprint import Fingerprint, fingerprint
from eos_monitor.isolation.parted_loss import assigned, told
from eos_monitor.isolation.sandbox import LossFn
from eos_monitor.isolation.twin import as_list, trained_parameters
from eos_monitor.limits.thresholds import learning_rates
from eos_monitor.monitor.engine import Engine
from eos_monitor.monitor.loop_gradient import LoopGradient
from eos_monitor.monitor.rows import append_jsonl
from eos_monitor.monitor.verification import Verification
from eos_monitor.readings.reading import Measurement, StabilityReading
from eos_monitor.readings.settings import Probe, Solver, names_moved_arguments
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.detector import Verdict
from eos_monitor.verdicts.steps import StepBuffer, follows

_LOG = logging.getLogger("eos_monitor")
_LOOKING_AHEAD = "looking ahead at what schedulers will set"
_HORIZON = 5  # steps in which a rise of the learning rate is looked for


class StabilityProbe:
    """The monitor without a Trainer: readings, verdicts and alerts of a plain PyTorch loop, while it runs.

    Call :meth:`step` once per optimizer step, before the update. It changes nothing in the run, and nothing of it
    raises into the loop. What it leaves to Lightning's callbacks: files and figures (:meth:`to_jsonl` writes the rows),
    loggers, layers, actions, and several processes.

    Args:
        module: Module that is trained.
        optimizer: Optimizer in use, or several.
        loss_fn: ``loss_fn(module, batch)`` -> scalar mean loss; with several optimizers that have losses of their own,
            ``{position: loss_fn}``, as in :class:`EdgeOfStabilityMonitor`.
        every_n_steps: Steps between readings; None for as often as ``max_overhead`` allows.
        max_overhead: Share of the training time that readings may take, in (0, 1].
        probe: The data to measure on, a :class:`Probe`; a kind (``"fixed"``, ``"batch"``) or an iterable of batches
            stand for one. ``full_batch`` has to be told: a loop cannot find it out.
        solver: How readings are solved, a :class:`Solver`.
        schedulers: Schedulers that are stepped after each optimizer step, wrapped or not, to look ahead; one that is
            stepped otherwise as :class:`.Scheduled`.
        projections: Follow each update, at one copy of the parameters and six passes over them a step; None for if it
            fits into the budget, and with ``every_n_steps`` for nets of up to 2²⁴ parameters in any case.
        alerts: What to do on a change of verdict: ``"log"`` (Python's logger ``eos_monitor``), a
            :class:`JSONLinesSink`, a :class:`WebhookSink`, or any function of an :class:`Alert`.
        verify: When to compare the run before and after a reading: ``"first"`` (until the first complete one),
            ``"always"`` or False.

    Attributes:
        readings: All readings, oldest first.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument does not exist, or belongs to :class:`Probe` or :class:`Solver`.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> loss_fn = lambda module, batch: module(batch).square().mean()
        >>> probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=Probe(full_batch=True))
        >>> for _ in range(3):
        ...     reading = probe.step(x)
        ...     sgd.zero_grad()
        ...     net(x).square().mean().backward()
        ...     sgd.step()
        >>> round(reading.edge_ratio, 4), probe.verdict.name
        (0.45, 'STABLE')
    """

    @names_moved_arguments
    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        loss_fn: LossFn | Mapping[int, LossFn],
        *,
        every_n_steps: int | None = None,
        max_overhead: float = 0.05,
        probe: Probe | str | Iterable[Any] = "fixed",
        solver: Solver | None = None,
        schedulers: Sequence[Any] = (),
        projections: bool | None = None,
        alerts: Sequence[str | Sink] = ("log",),
        verify: Literal["first", "always", False] = "first",
    ) -> None:
        check_alerts(alerts)
        if {"jsonl", "wandb"} & {alert for alert in alerts if isinstance(alert, str)}:
            raise ValueError(
                "Expected `alerts` to be 'log' and functions of an Alert, because a plain loop has neither a log "
                f"folder nor a logger, got {alerts!r}. Pass JSONLinesSink(path), or a function."
            )
        self._module = module
        every = as_list(optimizer)
        function, measured = assigned(loss_fn, every)
        self._loss_fn = function
        self._optimizers = measured
        self._probe = Probe.of(probe)
        self._engine = Engine(self._probe, solver or Solver(), every_n_steps=every_n_steps, max_overhead=max_overhead)
        self._step = 0
        self._written: dict[Path, int] = {}  # rows of this run in each file
        self._gradient = LoopGradient(module, function, measured, engine=self._engine, probe=self._probe)
        self._schedulers = [scheduled(entry) for entry in schedulers]
        self._ahead = SettingsAhead(self._schedulers, self._optimizers) if schedulers else None
        self._tracked = TrackedReading(None)
        self._verification = Verification(verify)
        self._throttle = Throttle()
        self._sinks = sinks_of(alerts, _LOG, None, ())
        self._engine.follow(self._optimizers)
        self._engine.changed = self._announce
        self._engine.tell = _say
        if not self._probe.full_batch:
            self._engine.start_small()
        params = trained_parameters(self._optimizers)
        self._steps = StepBuffer(
            params,
            self._engine.add_step,
            movements=follows(projections, params, exact=every_n_steps is not None),
            max_overhead=max_overhead,
            training_seconds=lambda: self._engine.schedule.training_seconds,
            tell=_say,
            guard=self._engine.guard,
        )
        self._engine.schedule.begin(0)
        several = told(loss_fn, every)
        if several is not None:
            _say(several)

    # ------------------------------------------------------------------ what users read

    @property
    def readings(self) -> list[StabilityReading]:
        """All readings, oldest first."""
        return self._engine.readings

    @property
    def eigenvectors(self) -> Tensor | None:
        """Critical modes of the last reading, ``(n, k)``, in parameter space."""
        return self._engine.eigenvectors

    @property
    def verdict(self) -> Verdict:
        """Verdict as of the last step; on an accelerator this reads the losses that wait there."""
        self._steps.catch_up()
        return self._engine.verdict

    @property
    def advisory(self) -> str | None:
        """What to look out for beside the verdict: ``"jump-risk"``, ``"loss-excess"``, or None."""
        self._steps.catch_up()
        return self._engine.detector.advisory

    @property
    def off(self) -> dict[str, str]:
        """What has been switched off, and why."""
        return dict(self._engine.guard.off)

    @property
    def overhead(self) -> float | None:
        """Time spent on readings as a share of the training time."""
        return self._engine.schedule.overhead

    def report(self) -> str:
        """Tell the run in a few sentences."""
        self._steps.catch_up()
        return self._engine.report()

    def to_jsonl(self, path: str | Path) -> None:
        """Append the readings that are not in it yet to a JSON-lines file, one a row."""
        self._steps.catch_up()
        file = Path(path).resolve()
        written = self._written.get(file, 0) if file.exists() else 0
        for row in self._engine.rows[written:]:
            append_jsonl(file, row)
            written += 1
            self._written[file] = written

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the detector's state as plain Python values."""
        self._steps.catch_up()
        return {"step": self._step} | self._engine.state_dict() | {"alerts": self._throttle.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned. The next reading starts cold."""
        self._step = state["step"]
        self._engine.schedule.begin(self._step)
        self._engine.load_state_dict(state)
        self._engine.follow(self._optimizers)
        self._throttle.load_state_dict(state["alerts"])

    # ------------------------------------------------------------------ the loop

    def step(self, batch: Any, loss: Tensor | float | None = None) -> StabilityReading | None:
        """Say that an optimizer step on ``batch`` is about to be taken; return a reading if one was due.

        Args:
            batch: Batch of the step.
            loss: Its loss, detached, if at hand; it feeds the verdict.
        """
        step = self._step
        self._step += 1
        return self._engine.guard.run("watching the loop", lambda: self._watch(step, batch, loss))

    def _watch(self, step: int, batch: Any, loss: Tensor | float | None) -> StabilityReading | None:
        engine = self._engine
        reading = None
        with engine.schedule.own_time():
            self._steps.end(step - 1)
            self._steps.begin(
                step,
                lambda: {
                    "lr": learning_rates(self._optimizers),
                    "lr_ahead": self._highest_rate(step),
                    "edge_ratio": self._tracked.edge_ratio(self._optimizers),
                },
            )
            engine.collect(batch)
            if self._probe.full_batch:
                engine.samples.close()  # the first batch is all there is
            if loss is not None:
                self._steps.add_loss(loss, whole=True)
            if engine.due(step):
                reading = self._measured(step, batch)
            self._gradient.step(batch, read=reading is not None)
        if reading is not None:
            self._steps.catch_up()  # what came before it is judged before it
            engine.add_reading(reading)
        return reading

    def _measured(self, step: int, batch: Any) -> StabilityReading | None:
        engine = self._engine

        def measure() -> Measurement | None:
            return engine.measure(
                self._module,
                self._loss_fn,
                self._optimizers,
                step=step,
                batch=batch,
                full_batch=bool(self._probe.full_batch) and engine.samples.whole,
            )

        measurement = self._verification.around(self._fingerprint, engine, _say, measure)
        if measurement is None:
            return None
        self._tracked = TrackedReading(measurement, self._tracked)
        self._steps.project_on(self._tracked.direction, trained_parameters(self._optimizers))
        return replace(measurement.reading, edge_ratio_next=self._next_edge_ratio(measurement, step))

    def _fingerprint(self) -> Fingerprint:
        schedulers = {f"schedulers[{i}]": entry.scheduler for i, entry in enumerate(self._schedulers)}
        return fingerprint(self._module, self._optimizers, also=schedulers, leave_out=(self,))

    def _highest_rate(self, step: int) -> float | None:
        ahead = self._ahead
        if ahead is None:
            return None
        rates = self._engine.guard.run(_LOOKING_AHEAD, lambda: ahead.rates(_HORIZON, Position(step)))
        return max(rates or (), default=None)

    def _next_edge_ratio(self, measurement: Measurement, step: int) -> float | None:
        ahead = self._ahead
        if ahead is None:
            return None
        settings = self._engine.guard.run(_LOOKING_AHEAD, lambda: ahead.after(1, Position(step)))
        return edge_ratio_at(measurement, self._optimizers, settings)

    def _announce(self, change: Change) -> None:
        readings = self._engine.readings
        alert = alert_of(change, readings[-1] if readings else None)
        if not self._throttle.passes(alert):
            return
        for sink in self._sinks:
            self._engine.guard.run("an output (sink)", lambda sink=sink: sink(alert), gives_up=False)  # type: ignore[misc]


def _say(sentence: str) -> None:
    _LOG.info("eos_monitor: %s", sentence)
