"""What a monitored run keeps: its probe, gauge, schedule, detector and readings. The loops around it are elsewhere."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.curvature.hessian import SumOverRanks
from eos_monitor.isolation.sandbox import LossFn, Sandbox
from eos_monitor.readings.gauge import Gauge
from eos_monitor.readings.guard import Attempts, everywhere
from eos_monitor.readings.reading import Measurement, StabilityReading
from eos_monitor.readings.samples import ProbeSamples
from eos_monitor.readings.schedule import Schedule
from eos_monitor.readings.settings import Probe
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.detector import InstabilityDetector, Verdict
from eos_monitor.verdicts.steps import kind_of

_WARM_UP_RETRY = 10
_T = TypeVar("_T")


def _same(value: Any) -> Any:
    return value


def _ignore(change: Change) -> None:
    return None


@dataclass(frozen=True)
class Ranks:
    """The processes of a data-parallel run; one process by default.

    Attributes:
        size: Number of processes.
        sum: Elementwise sum over them of a flat tensor; None for one process.
        from_first: What the first process has, on every one.
    """

    size: int = 1
    sum: SumOverRanks | None = None
    from_first: Callable[[Any], Any] = _same


class Engine:
    """Takes the readings of one run and turns them into a verdict.

    A failure inside a reading never leaves :meth:`measure`: it is told in one warning, and after three in a row
    measuring is off.

    Args:
        gauge: What takes the readings.
        every_n_steps: Steps between readings; None for as often as ``max_overhead`` allows.
        max_overhead: Share of the training time that readings may take.
        probe: See :class:`ProbeSamples`.
        probe_samples: See :class:`ProbeSamples`.
        batch_size_fn: Samples in a batch; by default the first dimension of its first tensor.
        seed: Seed of the schedule's jitter.
    """

    def __init__(
        self,
        gauge: Gauge,
        *,
        every_n_steps: int | None = None,
        max_overhead: float = 0.05,
        probe: str | Iterable[Any] = "fixed",
        probe_samples: int = 256,
        batch_size_fn: Callable[[Any], int] | None = None,
        seed: int = 0,
    ) -> None:
        self.schedule = Schedule(every_n_steps, max_overhead, seed=seed)
        self.samples = ProbeSamples(Probe(probe, probe_samples, batch_size_fn=batch_size_fn))
        self.detector = InstabilityDetector()
        self.readings: list[StabilityReading] = []
        self.rows: list[dict[str, Any]] = []  # the readings as plain values, each with the verdict of its time
        self.verdicts: list[tuple[int, Verdict]] = []  # one entry a change
        self.run_id = uuid.uuid4().hex[:12]  # from the operating system, not from a generator of the run's
        self.last_step: int | None = None  # that the detector has heard of
        self.changed: Callable[[Change], None] = _ignore  # called when the verdict or the advisory has changed
        self.ranks = Ranks()  # set before the first batch, and back after the last
        self._gauge = gauge
        self._full_everywhere = False
        self._probe_failure: str | None = None
        self._attempts = Attempts("measuring")

    @property
    def verdict(self) -> Verdict:
        """Verdict as of the last step."""
        return self.detector.verdict

    @property
    def eigenvectors(self) -> Tensor | None:
        """Critical modes of the last reading, ``(n, k)``, in parameter space."""
        return self._gauge.modes

    def due(self, step: int) -> bool:
        """Whether to measure before ``step``; the same on every process."""
        if not self.ready():
            return False
        if self.schedule.every_n_steps is not None or not self.schedule.deciding(step):
            return self.schedule.due(step)
        # The clocks differ, the first one decides.
        decision, self.schedule.next_step = self.ranks.from_first((self.schedule.due(step), self.schedule.next_step))
        return bool(decision)

    def affordable(self) -> bool:
        """Whether the budget has room for a reading; the same on every process."""
        return bool(self.ranks.from_first(self.schedule.affordable()))

    def collect(self, batch: Any) -> None:
        """Offer a training batch to the probe."""
        try:
            self.samples.observe(batch)
        except Exception as error:
            self._probe_failure = f"The probe cannot be collected: {error}"

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
        sandbox: Sandbox | None = None,
    ) -> Measurement | None:
        """Take a reading; None if it failed."""
        device = next((p.device for p in module.parameters()), torch.device("cpu"))

        def here() -> Measurement:
            return self._gauge.measure(
                module,
                loss_fn,
                self.samples.on(device, batch),
                optimizers,
                step=step,
                full_batch=full_batch,
                accumulate=accumulate if self.samples.whole else None,
                sandbox=sandbox,
                sum_over_ranks=self.ranks.sum,
            )

        def smaller() -> bool:
            # Smaller micro-batches need less for their graphs; with several processes they would have to agree.
            return self.ranks.sum is None and self.samples.halve()

        measurement = self._attempts.run(lambda: everywhere(here, self.ranks.sum, "a reading"), smaller)
        if measurement is None:
            return None
        if self._gauge.products_are_wrong:
            self.turn_off(self._gauge.check_note or "")
        elif not measurement.reading.ready:
            self.schedule.postpone(step, _WARM_UP_RETRY)
        return measurement

    def take(self, reading: StabilityReading, also_spent: float = 0.0) -> Verdict:
        """Keep a finished reading and return the verdict.

        Args:
            reading: The reading.
            also_spent: Seconds that were spent on the same occasion beside it.
        """
        self.readings.append(reading)
        if reading.ready and self.off is None:
            self.schedule.measured(reading.step, reading.seconds + also_spent)
            self.schedule.next_step = self.ranks.from_first(self.schedule.next_step)
        if reading.edge_ratio is not None and not reading.converged:
            self.warn_once(
                "unconverged",
                f"The reading at step {reading.step} did not converge in {reading.matvecs} products (relative residual "
                f"{reading.residual:.1e}); such readings are marked and do not move the verdict.",
            )
        verdict = self._update(reading.step, reading=reading)
        bookkeeping = {"run": self.run_id, "verdict": verdict.name, "overhead": self.schedule.overhead}
        self.rows.append(bookkeeping | asdict(reading))
        return verdict

    def take_step(self, step: int, **inputs: Any) -> Verdict:
        """Take in what a step brought; see :meth:`InstabilityDetector.update`."""
        return self._update(step, **inputs)

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Tell the detector which kind of optimizer it watches; what it has seen so far stays."""
        state, self.detector = self.detector.state_dict(), InstabilityDetector(**kind_of(optimizers))
        self.detector.load_state_dict(state)

    def forget_verdict(self) -> None:
        """Start the verdict afresh."""
        self.detector = InstabilityDetector()

    @property
    def off(self) -> str | None:
        """Why measuring stopped; None while it goes on."""
        return self._attempts.off

    def turn_off(self, why: str) -> None:
        """Stop measuring for the rest of the run."""
        self._attempts.turn_off(why)

    def attempt(self, action: Callable[[], _T]) -> _T | None:
        """Do something around a reading that must not end the run; None if it failed."""
        return self._attempts.run(action)

    def warn_once(self, topic: str, message: str) -> None:
        """Warn, once a topic."""
        self._attempts.warn_once(topic, message)

    def ready(self) -> bool:
        """Whether readings can be taken; the same on every process."""
        if self.off is None and not self._full_everywhere:
            failed, full = self._probe_failure is not None, self.samples.full
            if self.ranks.sum is not None:
                failures, filled = self.ranks.sum(torch.tensor([float(failed), float(full)])).tolist()
                failed, full = failures > 0, filled == self.ranks.size
            if failed:
                self.turn_off(self._probe_failure or "The probe cannot be collected on another process.")
                return False
            self._full_everywhere = full
        return self.off is None and self._full_everywhere

    def _update(self, step: int, **inputs: Any) -> Verdict:
        detector = self.detector
        before, advisory = detector.verdict, detector.advisory
        verdict = detector.update(step, **inputs)
        self.last_step = max(step, self.last_step or 0)
        if verdict != before or not self.verdicts:
            self.verdicts.append((step, verdict))
        if verdict != before:
            self.changed(Change(step, verdict, before, None, detector.reason))
        if detector.advisory is not None and detector.advisory != advisory:
            self.changed(Change(step, verdict, before, detector.advisory, detector.advice or ""))
        return verdict


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a JSON-lines file; numbers that JSON lacks become null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(row), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
