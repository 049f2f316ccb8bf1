"""What a monitored run keeps: its probe, gauge, schedule, detector and readings. The loops around it are elsewhere."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.curvature.spread import couples_samples
from eos_monitor.dashboard.report import run_report
from eos_monitor.isolation.sandbox import LossFn, Sandbox
from eos_monitor.monitor.loss_match import LossMatch
from eos_monitor.monitor.ranks import Ranks
from eos_monitor.monitor.rows import Rows
from eos_monitor.readings.gauge import Gauge
from eos_monitor.readings.guard import MEASURING, Guard, everywhere
from eos_monitor.readings.reading import Measurement, StabilityReading
from eos_monitor.readings.samples import HALVED, ProbeSamples
from eos_monitor.readings.schedule import Schedule
from eos_monitor.readings.settings import Probe, Solver
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.detector import InstabilityDetector, Verdict
from eos_monitor.verdicts.steps import kind_of

_WARM_UP_RETRY = 10
_PAUSE_STEPS = 60
_PAUSE_SECONDS = 2.0
# The size of the probe is settled after the first warm readings, for so many readings in a run of a known length.
_SETTLED_AFTER = 3
_READINGS_WANTED = 30
_USUAL_STEPS = 10_000


def _ignore(change: Change) -> None:
    return None


def _silent(sentence: str) -> None:
    return None


class Engine:
    """Takes the readings of one run and turns them into a verdict.

    A failure inside a reading never leaves :meth:`measure`: it is told in one warning, and after three in a row
    measuring is off.

    Args:
        probe: What readings are taken on.
        solver: How they are solved.
        every_n_steps: Steps between readings; None for as often as ``max_overhead`` allows.
        max_overhead: Share of the training time that readings may take.

    Attributes:
        readings: All readings, oldest first.
        rows: They as plain values, each with the verdict of its time.
        verdicts: (step, verdict), one entry a change.
        last_step: The last step that the detector has heard of.
        changed: Called when the verdict or the advisory has changed.
        ranks: The processes; set before the first batch, and back after the last.
        guard: Keeps all of it from ending the run.
        expected_steps: Steps that the run will have; None if nobody knows.
        tell: Called with what a user should know, in words.
        match: Whether the loss that is measured is the one that steps take.
    """

    def __init__(
        self,
        probe: Probe,
        solver: Solver,
        *,
        every_n_steps: int | None = None,
        max_overhead: float = 0.05,
    ) -> None:
        self.schedule = Schedule(every_n_steps, max_overhead, seed=solver.seed)
        self.samples = ProbeSamples(probe)
        self.detector = InstabilityDetector()
        self.readings: list[StabilityReading] = []
        self.rows = Rows()
        self.verdicts: list[tuple[int, Verdict]] = []
        self.run_id = uuid.uuid4().hex[:12]  # from the operating system, not from a generator of the run's
        self.last_step: int | None = None
        self.changed: Callable[[Change], None] = _ignore
        self.ranks = Ranks()
        self.guard = Guard()
        self.expected_steps: int | None = None
        self.tell: Callable[[str], None] = _silent
        self._max_pause = probe.max_pause
        self.match = LossMatch(self.guard)
        self._gauge = Gauge(solver, probe.batch_size_fn)
        self._full_everywhere = False
        self._probe_failure: str | None = None
        self._optimizers: Sequence[Optimizer] = ()
        self._watched_before: list[list[Any]] = []  # by the run that this one goes on from

    # ------------------------------------------------------------------ what users read

    @property
    def verdict(self) -> Verdict:
        """Verdict as of the last step."""
        return self.detector.verdict

    @property
    def eigenvectors(self) -> Tensor | None:
        """Critical modes of the last reading, ``(n, k)``, in parameter space."""
        return self._gauge.modes

    @property
    def off(self) -> str | None:
        """Why measuring stopped; None while it goes on."""
        return self.guard.off.get(MEASURING)

    def report(self) -> str:
        """Tell the run in a few sentences."""
        return run_report(
            self.rows,
            [(step, verdict.name) for step, verdict in self.verdicts],
            self.schedule.overhead,
            last_step=self.last_step,
            reason=self.detector.reason,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the detector's state, and what it was about, as plain Python values."""
        return {"detector": self.detector.state_dict(), "watched": _described(self._optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. The first reading after it is a cold one."""
        self.detector.load_state_dict(state["detector"])
        self._watched_before = state["watched"]

    # ------------------------------------------------------------------ the run

    def share(self, ranks: Ranks) -> None:
        """Measure on the processes of a data-parallel run, each on its part of the samples."""
        self.ranks = ranks
        self.guard.alone = ranks.size == 1
        self.samples.share(ranks.size)

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Tell the detector which kind of optimizer it watches; what it has seen so far stays, if it fits."""
        self._optimizers = optimizers
        watched = _described(optimizers)
        fits = not self._watched_before or self._watched_before == watched
        if not fits:
            self.guard.warn_once(
                "resumed",
                f"eos_monitor: the run that this one goes on from trained {self._watched_before} (optimizer, number "
                f"of parameters), this one {watched}; its verdict starts afresh.",
            )
        self._watched_before = []
        state = self.detector.state_dict() if fits else None
        self.detector = InstabilityDetector(**kind_of(optimizers))
        if state is not None:
            self.detector.load_state_dict(state)

    def collect(self, batch: Any) -> None:
        """Offer a training batch to the probe."""
        try:
            self.samples.observe(batch)
        except Exception as error:
            self._probe_failure = f"The probe cannot be collected: {error}"

    # ------------------------------------------------------------------ readings

    def ready(self) -> bool:
        """Whether readings can be taken; the same on every process."""
        if self.off is None and not self._full_everywhere:
            failures, filled = self.ranks.total(float(self._probe_failure is not None), float(self.samples.full))
            if failures > 0:
                why = self._probe_failure or "The probe cannot be collected on another process."
                self.guard.turn_off(MEASURING, why)
                return False
            self._full_everywhere = filled == self.ranks.size
        return self.off is None and self._full_everywhere

    def due(self, step: int) -> bool:
        """Whether to measure before ``step``; the same on every process."""
        if not self.ready():
            return False
        if self.schedule.every_n_steps is not None or not self.schedule.deciding(step):
            return self.schedule.due(step)
        # The clocks differ, the first one decides.
        decision, self.schedule.next_step = self.ranks.from_first((self.schedule.due(step), self.schedule.next_step))
        return bool(decision)

    def start_small(self) -> None:
        """Begin with a probe of one batch, where its size and the cadence are ours to choose."""
        if self.schedule.every_n_steps is None:
            self.samples.start_small()

    @property
    def max_pause(self) -> float | None:
        """Seconds that a reading may hold the run; None for no limit."""
        if self._max_pause is not None:
            return self._max_pause
        if self.schedule.every_n_steps is not None:
            return None  # whoever sets the cadence has set the cost
        return max(_PAUSE_STEPS * (self.schedule.step_seconds or 0.0), _PAUSE_SECONDS)

    def affordable(self) -> bool:
        """Whether the budget has room for a reading; the same on every process."""
        return bool(self.ranks.from_first(self.schedule.affordable()))

    def measure(
        self,
        module: nn.Module,
        loss_fn: LossFn,
        optimizers: Sequence[Optimizer],
        *,
        step: int,
        batch: Any,
        full_batch: bool,
        accumulate: int = 1,
        sandbox: Callable[[], Sandbox] | None = None,
    ) -> Measurement | None:
        """Take a reading; None if it failed."""
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.ranks.meet()
        pause = self.ranks.from_first(self.max_pause)

        def here() -> Measurement:
            return self._gauge.measure(
                module,
                loss_fn,
                self.samples.on(device, batch),
                optimizers,
                step=step,
                full_batch=full_batch and not self.samples.halved,
                accumulate=accumulate if self.samples.whole else None,
                sandbox=None if sandbox is None else sandbox(),
                sum_over_ranks=self.ranks.sum,
                pause=pause,
                others=self.samples.others(device),
            )

        def smaller() -> bool:
            # Smaller micro-batches need less for their graphs; with several processes they would have to agree.
            # And where batch statistics couple the samples, a smaller batch has another loss.
            return self.ranks.sum is None and not couples_samples(module) and self.samples.halve()

        measurement = self.guard.run(MEASURING, lambda: everywhere(here, self.ranks.sum, "a reading"), smaller=smaller)
        if measurement is None:
            return None
        for note in measurement.reading.notes:
            if "batch_size_fn" in note:
                self.guard.warn_once("samples", f"eos_monitor: {note}.")
        notes = measurement.reading.notes + ((HALVED,) if self.samples.halved else ())
        measurement = replace(measurement, reading=replace(measurement.reading, notes=self.match.noted(notes)))
        if self._gauge.products_are_wrong:
            self.guard.turn_off(MEASURING, self._gauge.check_note or "")
        elif not measurement.reading.ready:
            self.schedule.postpone(step, _WARM_UP_RETRY)
        return measurement

    def add_reading(self, reading: StabilityReading, also_spent: float = 0.0) -> Verdict:
        """Keep a finished reading and return the verdict.

        Args:
            reading: The reading.
            also_spent: Seconds that observers took beside it.
        """
        self.readings.append(reading)
        if reading.ready and self.off is None:
            self.schedule.measured(reading.step, reading.seconds + also_spent)
            self.schedule.next_step = self.ranks.from_first(self.schedule.next_step)
            if self.samples.small:
                self._settle_size()
        if reading.edge_ratio is not None and not reading.converged:
            self.guard.warn_once(
                "unconverged",
                f"The reading at step {reading.step} did not converge in {reading.matvecs} products (relative residual "
                f"{reading.residual:.1e}); such readings are marked and do not move the verdict.",
            )
        verdict = self.add_step(reading.step, reading=reading)
        self.rows.add(self.run_id, verdict.name, self.schedule.overhead, reading)
        return verdict

    def _settle_size(self) -> None:
        """Let the probe grow as far as the budget and a pause have room, once, after its first warm readings."""
        ready = sum(reading.edge_ratio is not None for reading in self.readings)
        if ready < _SETTLED_AFTER or self.samples.collecting:
            return
        schedule = self.schedule
        steps = self.expected_steps or _USUAL_STEPS
        room = schedule.max_overhead * steps * (schedule.step_seconds or 0.0) - schedule.spent
        room = min(room / _READINGS_WANTED, self.max_pause or room)
        factor = self.samples.grow(self.ranks.from_first(room / max(schedule.predicted_cost, 1e-9)))
        if factor > 1.0:
            schedule.costs_change(factor)
            self._gauge.renew_error()
            self.tell(f"the probe has grown to {self.samples.describe()}, as the budget has room for it")

    def add_step(self, step: int, **inputs: Any) -> Verdict:
        """Take in what a step brought; see :meth:`InstabilityDetector.update`."""
        detector = self.detector
        before = detector.verdict
        advisory = detector.advisory
        verdict = detector.update(step, **inputs)
        self.last_step = max(step, self.last_step or 0)
        if verdict != before or not self.verdicts:
            self.verdicts.append((step, verdict))
        if verdict != before:
            self.changed(Change(step, verdict, before, None, detector.reason))
        if detector.advisory is not None and detector.advisory != advisory:
            self.changed(Change(step, verdict, before, detector.advisory, detector.advice or ""))
        return verdict


def _described(optimizers: Sequence[Optimizer]) -> list[list[Any]]:
    """Return the type of each optimizer, and how many parameters it has: at this moment, as layers may be thawed."""
    return [
        [type(optimizer).__name__, sum(p.numel() for group in optimizer.param_groups for p in group["params"])]
        for optimizer in optimizers
    ]
