"""What rules say of labelled runs, and how right they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eos_monitor import InstabilityDetector, StabilityReading, Verdict
from tests.benchmarks.labelled_runs import Run

_EARLY = 100  # steps: an alarm that began and ended longer before a failure was a false one
_SCORED = ("jump", "gradual", "early")  # data faults are no optimizer rule's business


@dataclass(frozen=True)
class Said:
    """What a rule said at every step of a run.

    Attributes:
        alarm: Whether it called the run lost.
        advisory: Whether it warned of a jump of the learning rate.
        verdicts: Its verdicts, for a detector.
    """

    run: Run
    alarm: np.ndarray
    advisory: np.ndarray
    verdicts: np.ndarray | None = None

    @property
    def entries(self) -> np.ndarray:
        """Steps at which an alarm began."""
        return np.flatnonzero(self.alarm & ~np.r_[False, self.alarm[:-1]])

    @cached_property
    def kind(self) -> str:
        return self.run.label.kind

    @cached_property
    def survived_jump(self) -> bool:
        return self.run.scenario == "jump" and self.run.label.onset is None

    @cached_property
    def called(self) -> bool:
        return bool(self.alarm.any())

    @cached_property
    def hit(self) -> bool:
        """Whether a failing run was called: an alarm while it fails, or one that began shortly before."""
        onset = self.run.label.onset
        assert onset is not None
        return bool(self.alarm[onset:].any() or (self.entries >= onset - _EARLY).any())

    @cached_property
    def in_time(self) -> bool:
        """Whether a failing run was called while its loss was still finite."""
        if not self.hit:
            return False
        assert self.run.label.onset is not None
        finite = np.isfinite(self.run.loss[: self.run.steps])
        return bool((self.alarm & finite)[max(0, self.run.label.onset - _EARLY) :].any())

    @cached_property
    def lag(self) -> int | None:
        """Steps from the beginning of the failure to the alarm; negative if it came before."""
        onset = self.run.label.onset
        assert onset is not None
        if self.alarm[onset]:
            return int(self.entries[self.entries <= onset][-1] - onset)
        later = self.entries[self.entries >= max(0, onset - _EARLY)]
        return int(later[0] - onset) if len(later) else None

    @cached_property
    def healthy_steps(self) -> int:
        return healthy_steps(self.run)

    @cached_property
    def false_alarms(self) -> int:
        return int((self.entries < self.healthy_steps).sum())

    @cached_property
    def flagged(self) -> bool:
        """Whether a jump was warned of before its first step at the new learning rate."""
        at = self.run.jump_at
        assert at is not None
        return bool((self.advisory | self.alarm)[max(0, at - 6) : at + 1].any())


def healthy_steps(run: Run) -> int:
    onset = run.label.onset
    return run.steps if onset is None else max(0, onset - _EARLY)


def readings_of(run: Run) -> dict[int, StabilityReading]:
    """The recorded readings as the monitor would hand them over."""
    beta, found = run.optimizer.beta, {}
    for step, (r, error, sharpness, spread) in zip(run.read_at.tolist(), run.read.tolist(), strict=True):
        lr = float(run.lr[step])
        ready = run.optimizer.betas is None or step > max(10.0, 3 / (1 - beta))
        has_lines = np.isfinite(sharpness) and run.optimizer.betas is None
        found[step] = StabilityReading(
            step=step,
            loss=None,
            lr=(lr,),
            edge_ratio=r if ready and np.isfinite(r) else None,
            error=error if ready and np.isfinite(r) else None,
            sampling_error=None,
            full_batch=run.optimizer.full_batch,
            converged=bool(np.isfinite(r)),
            ready=ready,
            batch_sharpness=sharpness if has_lines else None,
            batch_sharpness_error=spread if has_lines else None,
            batch_sharpness_limits=(2 * (1 - beta) / lr, 2 * (1 + beta) / lr) if has_lines else None,
        )
    return found


def inputs_of(run: Run, *, by_hand: bool = False) -> Iterator[dict[str, object]]:
    """The arguments of every step, in the order in which a callback knows them: an update with the step after it."""
    readings = readings_of(run)

    def number(series: np.ndarray, step: int) -> float | None:
        return float(series[step]) if step >= 0 and np.isfinite(series[step]) else None

    for step in range(run.steps):
        ahead = None if by_hand else float(run.lr[step : step + 6].max())
        yield {
            "step": step,
            "loss": float(run.loss[step]),
            "lr": float(run.lr[step]),
            "reading": readings.get(step),
            "lr_ahead": ahead,
            "projection": number(run.projection, step - 1),
            "random_projection": number(run.random_projection, step - 1),
            "relative_update": number(run.relative_update, step - 1),
        }


def detector_for(run: Run) -> InstabilityDetector:
    optimizer = run.optimizer
    return InstabilityDetector(family=optimizer.family, momentum=optimizer.beta, full_batch=optimizer.full_batch)


def detect(run: Run, *, by_hand: bool = False) -> Said:
    detector, verdicts, advisories = detector_for(run), [], []
    for given in inputs_of(run, by_hand=by_hand):
        verdicts.append(int(detector.update(**given)))  # type: ignore[arg-type]
        advisories.append(detector.advisory == "jump-risk")
    said = np.array(verdicts)
    return Said(run, said == Verdict.DIVERGING, np.array(advisories), said)


def as_said(run: Run, alarm: Sequence[bool]) -> Said:
    return Said(run, np.asarray(alarm), np.zeros(len(alarm), dtype=bool))


Statistic = Callable[[Sequence[Said]], float]


def _share(of: Iterable[bool]) -> float:
    values = list(of)
    return sum(values) / len(values) if values else float("nan")


def failures(said: Iterable[Said], *kinds: str) -> list[Said]:
    return [s for s in said if s.kind in (kinds or _SCORED)]


STATISTICS: dict[str, Statistic] = {
    "failures called": lambda said: _share(s.hit for s in failures(said)),
    "called while finite": lambda said: _share(s.in_time for s in failures(said)),
    "before 3 × median": lambda said: _share((s.lag or 0) < 0 for s in failures(said)),
    "gradual before": lambda said: _share((s.lag or 0) < 0 for s in failures(said, "gradual")),
    "false per 10⁴": lambda said: 1e4 * sum(s.false_alarms for s in said) / max(1, sum(s.healthy_steps for s in said)),
    "edge runs called": lambda said: _share(s.called for s in said if s.kind == "edge"),
    "surviving jumps called": lambda said: _share(s.called for s in said if s.survived_jump),
}
JUMPS: dict[str, Statistic] = {
    "failing jumps flagged": lambda said: _share(s.flagged for s in failures(said, "jump")),
    "surviving jumps flagged": lambda said: _share(s.flagged for s in said if s.survived_jump),
}


def interval(
    statistic: Statistic, said: Sequence[Said], *, draws: int = 400, seed: int = 0
) -> tuple[float, float, float]:
    """Return a statistic and its 95 % bootstrap interval over runs."""
    rng = np.random.default_rng(seed)
    values = [statistic([said[i] for i in rng.integers(len(said), size=len(said))]) for _ in range(draws)]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return statistic(said), float(low), float(high)
