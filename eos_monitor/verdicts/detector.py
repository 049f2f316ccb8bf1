"""From readings, losses and updates to one word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from eos_monitor.readings.reading import StabilityReading
from eos_monitor.verdicts.divergence import Divergence
from eos_monitor.verdicts.edge_history import EdgeHistory
from eos_monitor.verdicts.excursions import Excursions
from eos_monitor.verdicts.jump_risk import JumpRisk, class_of
from eos_monitor.verdicts.oscillation import Oscillation
from eos_monitor.verdicts.passed_over import PassedOver
from eos_monitor.verdicts.restraint import Restraint

_FAMILIES = ("sgd", "nesterov", "adam")
_LOWER_AFTER = 16  # steps of a lower verdict until a higher one is left
_NEAR = 0.1  # distance of an edge ratio from 1
_AT = 0.95  # an edge ratio
_BATCH_LINE = 0.75  # batch sharpness marks the edge to within a quarter
_BATCH_LINE_LEFT = 0.65
_PASSED_OVER = 3  # readings in a row that say nothing
_LEARN_FROM = 64  # steps without a reading until the run counts as unknown


class Verdict(IntEnum):
    """What a run is doing, as far as it can be known."""

    UNKNOWN = -1
    WARMING_UP = 0
    STABLE = 1
    SHARPENING = 2
    EDGE = 3
    RESTRAINED = 4
    DIVERGING = 5


# To go up is immediate; to go down takes _LOWER_AFTER steps. What is not known lies above what is known to be calm.
_LEVEL = {
    Verdict.WARMING_UP: 0,
    Verdict.STABLE: 1,
    Verdict.SHARPENING: 2,
    Verdict.UNKNOWN: 3,
    Verdict.EDGE: 4,
    Verdict.RESTRAINED: 5,
    Verdict.DIVERGING: 6,
}


class InstabilityDetector:
    r"""One verdict a step from readings, losses and updates, and an advisory beside it.

    Edge ratios r follow the learning rate between readings. Their error σ is at least 2 % (10 % more on a minibatch
    probe of unknown spread). The first rule that applies gives the verdict:

    ===============  =============================================================  ===================================
    verdict          enters                                                         leaves
    ===============  =============================================================  ===================================
    ``DIVERGING``    loss not finite, or out of bounds (:class:`.Excursions`) with  128 losses in a row below 1.5 ×
                     r > 0.9 (or unknown) since 64 steps before                     the median
    ``WARMING_UP``   no reading yet, or the optimizer's state is too young          the first reading that counts
    ``STABLE``       *still*: relative updates below 1e-9 for 32 steps              —
    ``RESTRAINED``   r − 2σ > 1 in 2 of the last 4 readings, or r rose above 1      128 steps without r − 2σ > 1 in 8
                     twice in 16, for 32 steps, while updates neither vanish nor    readings, without a rise in 16,
                     die out; or updates locked to a period                         and without a lock
    ``STABLE``       *dying out*: full batch, r < 1 in 4 readings, updates of the   16 steps of another
                     last 32 steps below half of those 64 to 128 steps ago
    ``EDGE``         the last r − 2σ > 1; or \|r − 1\| ≤ max(0.1, 2σ) in 3 of 5     16 steps of another
                     and (updates flip, or r ≥ 0.95); or, with plain SGD, batch
                     sharpness ≥ 0.75 of its line (then down to 0.65)
    ``SHARPENING``   r + 2σ < 1 and curvature grows significantly                   16 steps of another
    ``STABLE``       full batch: r + 2σ < 1; minibatches: and batch sharpness       at once
                     + 2 errors < 0.75 of its small-batch line
    ``UNKNOWN``      nothing of this: :attr:`reason` says what cannot be known      16 steps of a calmer one
    ===============  =============================================================  ===================================

    ``DIVERGING`` is confirmed, not foreseen: :attr:`lateness` tells how late it is. Without readings the updates alone
    say at most ``RESTRAINED``. Readings that did not converge, or are stale, are passed over; where there are no
    others, the reason says why, and after three in a row the verdict is ``UNKNOWN``.

    Whatever is missing may be left out, and :meth:`update` may be called several times a step.

    Args:
        family: ``"sgd"`` (momentum included), ``"nesterov"``, or ``"adam"`` for every optimizer with a second moment.
        momentum: β of the optimizer: momentum, or β1, in [0, 1).
        full_batch: Whether each step uses all the data, as long as no reading has said so.

    Attributes:
        verdict: Verdict as of the last update.
        reason: It in words.
        oscillation: The rhythm of the updates.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> detector = InstabilityDetector()
        >>> detector.update(0, loss=2.3)
        <Verdict.WARMING_UP: 0>
        >>> detector.update(1, loss=float("nan"))
        <Verdict.DIVERGING: 5>
        >>> detector.reason
        'The loss is not finite, as of step 1.'
    """

    def __init__(self, *, family: str = "sgd", momentum: float = 0.0, full_batch: bool = False) -> None:
        if family not in _FAMILIES:
            raise ValueError(f"Expected `family` to be one of {', '.join(_FAMILIES)}, got {family!r}.")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"Expected `momentum` in [0, 1), got {momentum}.")
        self.verdict = Verdict.WARMING_UP
        self.reason = "Nothing is known yet."
        self.oscillation = Oscillation(momentum)
        self._family = family
        self._momentum = momentum
        self._full_batch = full_batch
        self._losses = Excursions(adaptive=family == "adam")
        self._edge = EdgeHistory()
        self._jump = JumpRisk()
        self._divergence = Divergence(self._losses, momentum)
        self._restraint = Restraint()
        self._lr: tuple[float, ...] | None = None
        self._ratio: float | None = None
        self._first_step: int | None = None
        self._readings = "none"  # or "young", "no edge", "usable"
        self._passed_over = PassedOver()
        self._level_held_at = 0

    @property
    def advisory(self) -> str | None:
        """``"jump-risk"`` for 64 steps from a fast rise of lr to a high r, ``"loss-excess"`` with a low r, or None."""
        if self._jump.ratio is not None:
            return "jump-risk"
        return "loss-excess" if self._losses.out and not self._divergence.blamed else None

    @property
    def advice(self) -> str | None:
        """The advisory in words, with the share of the benchmark's jumps of this kind that failed."""
        if self.advisory == "loss-excess":
            return "The loss is out of bounds without an edge: look at the data."
        return self._jump.advice(self._class)

    @property
    def jump_ratio(self) -> float | None:
        """Edge ratio that the present fast rise of the learning rate leads to; None without one."""
        return self._jump.ratio

    @property
    def edge_ratio(self) -> float | None:
        """Last edge ratio, at the learning rate of the last update."""
        return self._ratio

    @property
    def lateness(self) -> int | None:
        """Steps from the first loss above 3 × the median to the confirmation; None unless out of bounds."""
        return self._losses.lateness

    @property
    def out_since(self) -> int | None:
        """Step since which the losses are above 3 × their median, confirmed or not; None while they are not."""
        return self._losses.crossed_at

    @property
    def steps_to_edge(self) -> float | None:
        """Steps until r = 1 at the present growth of the curvature and learning rate; None if it does not grow."""
        if self._edge.growth is None or self._ratio is None or not 0.0 < self._ratio < 1.0:
            return None
        return -math.log(self._ratio) / self._edge.growth

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        lr: float | Sequence[float] | None = None,
        reading: StabilityReading | None = None,
        projection: float | None = None,
        random_projection: float | None = None,
        relative_update: float | None = None,
        lr_ahead: float | None = None,
        edge_ratio: float | None = None,
    ) -> Verdict:
        """Take in what is known before the update of ``step``, and return the verdict.

        Args:
            step: Optimizer step.
            loss: Mean training loss of the step.
            lr: Learning rate that the step will use; of every group, or a common one.
            reading: The reading taken before the step.
            projection: The update before this one on the critical mode, ⟨C x, Δθ⟩, of a sign that stays.
            random_projection: That update on a fixed random vector.
            relative_update: That update's ‖Δθ‖ / ‖θ‖.
            lr_ahead: The highest learning rate of the next five steps, of the group of the first ``lr``.
            edge_ratio: Edge ratio at the settings of this step, where more than the learning rate has changed.
        """
        self._first_step = step if self._first_step is None else min(step, self._first_step)
        if lr is not None:
            self._lr = (float(lr),) if isinstance(lr, (int, float)) else tuple(float(value) for value in lr)
        elif reading is not None:
            self._lr = tuple(reading.lr) or self._lr
        if reading is not None:
            self._add(reading)
        self._edge.follow(self._lr)
        self._ratio = self._edge.ratio if edge_ratio is None else edge_ratio
        self._divergence.add(step, self._ratio, self._class)
        if lr is not None:
            self._jump.add(step, self._lr[0] if self._lr else None, lr_ahead, self._ratio, self._class)
        if loss is not None:
            self._losses.add(step, float(loss))
        if projection is not None or random_projection is not None or relative_update is not None:
            self.oscillation.add(projection, random_projection, relative_update)
        verdict, reason = self._judge(step)
        self._settle(step, verdict, reason)
        return self.verdict

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        divergence = self._divergence
        restraint = self._restraint
        steps = [self._first_step, divergence.hot_at, restraint.beyond_since, restraint.seen_at, self._level_held_at]
        return {
            "verdict": [int(self.verdict), self.reason],
            "losses": self._losses.state_dict(),
            "edge": self._edge.state_dict(),
            "jump": self._jump.state_dict(),
            "oscillation": self.oscillation.state_dict(),
            "lr": None if self._lr is None else list(self._lr),
            "ratio": self._ratio,
            "readings": self._readings,
            "passed_over": self._passed_over.state_dict(),
            "steps": steps,
            "blamed": divergence.blamed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        verdict, self.reason = state["verdict"]
        self.verdict = Verdict(verdict)
        self._losses.load_state_dict(state["losses"])
        self._edge.load_state_dict(state["edge"])
        self._jump.load_state_dict(state["jump"])
        self.oscillation.load_state_dict(state["oscillation"])
        self._lr = None if state["lr"] is None else tuple(state["lr"])
        self._ratio = state["ratio"]
        self._readings = state["readings"]
        self._passed_over.load_state_dict(state.get("passed_over", [0, None]))
        self._first_step, hot_at, beyond_since, seen_at, self._level_held_at = state["steps"]
        self._divergence.hot_at = hot_at
        self._divergence.blamed = state["blamed"]
        self._restraint.beyond_since = beyond_since
        self._restraint.seen_at = seen_at

    @property
    def _class(self) -> str:
        full = self._edge.full_batch if self._edge.entries else self._full_batch
        return class_of(self._family, self._momentum, full)

    def _add(self, reading: StabilityReading) -> None:
        if not reading.ready:
            self._readings = "young"
            self._edge.clear()
        elif reading.edge_ratio is None or reading.error is None:
            self._readings = "no edge"
            self._edge.clear()
        elif not reading.stale and reading.converged:
            self._readings = "usable"
            self._edge.add(reading)
        elif self._readings != "usable":
            self._readings = "none"  # no longer young
        self._passed_over.add(reading)

    def _judge(self, step: int) -> tuple[Verdict, str]:
        """Return the verdict that the present rules give, without the memory of the last one."""
        lost = self._divergence.judge(self._ratio)
        if lost is not None:
            return Verdict.DIVERGING, lost
        if self._readings == "young":
            return Verdict.WARMING_UP, "The optimizer's state is too young to have an edge."
        if self._readings != "usable":
            return self._judge_updates(step)
        if self.oscillation.still:
            return Verdict.STABLE, "Nothing moves any more."
        restrained = self._restraint.judge(step, self._edge, self.oscillation)
        if restrained is not None:
            return Verdict.RESTRAINED, restrained
        return self._judge_ratios()

    def _judge_updates(self, step: int) -> tuple[Verdict, str]:
        if self.oscillation.period is not None:
            return Verdict.RESTRAINED, f"The updates repeat with period {self.oscillation.period}."
        flips = self.oscillation.flips
        ratio = self.oscillation.edge_ratio
        if flips is not None and ratio is not None and flips > 0.5 and ratio >= _AT:
            return Verdict.EDGE, f"The updates flip as they do at an edge ratio of {ratio:.2g}; no reading says so."
        if self._readings == "no edge":
            return Verdict.UNKNOWN, "The edge of this optimizer is not known, or was not measured."
        needed = max(_LEARN_FROM, 3 / (1 - self._momentum))
        early = step - (self._first_step or 0) < needed
        passed_over = self._passed_over
        if passed_over.told is not None:  # to wait for more of them makes nothing known
            early = early and passed_over.count < _PASSED_OVER
            return Verdict.WARMING_UP if early else Verdict.UNKNOWN, passed_over.told
        if early:
            return Verdict.WARMING_UP, "There is no reading yet."
        return Verdict.UNKNOWN, "There is no reading, and updates alone never prove a run stable."

    def _judge_ratios(self) -> tuple[Verdict, str]:
        edge = self._edge
        last = edge.entries[-1]
        if self._ratio is None:
            return Verdict.UNKNOWN, "The settings changed in a way that the last edge ratio cannot be followed through."
        r = self._ratio
        margin = 2 * last.error * (r / last.ratio if last.ratio else 1.0)
        if edge.full_batch and r < 1.0 and self._dying_out():
            return Verdict.STABLE, "The updates die out."
        if edge.beyond[-1]:
            return Verdict.EDGE, f"The edge ratio is {r:.2f}, above 1 by more than twice its error."
        if (
            abs(r - 1.0) <= max(_NEAR, margin)
            and sum(abs(e.ratio - 1.0) <= max(_NEAR, 2 * e.error) for e in edge.entries[-5:]) >= 3
            and (r >= _AT or (self.oscillation.flips or 0.0) > 0.5)
        ):
            return Verdict.EDGE, f"The edge ratio hovers at 1: {r:.2f} now."
        if not edge.full_batch:
            return self._judge_minibatches(r + margin)
        if r + margin >= 1.0:
            return Verdict.UNKNOWN, f"The edge ratio, {r:.2f}, is too close to 1 for its error."
        return self._calm()

    def _judge_minibatches(self, upper: float) -> tuple[Verdict, str]:
        """Judge by the rule of minibatches: they bring the instability before r = 1."""
        if self._family == "adam":
            return Verdict.UNKNOWN, "With minibatches an adaptive optimizer has no known line below which it is stable."
        share = self._edge.batch_share
        if share is None:
            return Verdict.UNKNOWN, "With minibatches a small edge ratio proves nothing without batch sharpness."
        value, error = share
        # Once there, a little lower still counts: successive readings differ by some 10 %.
        line = _BATCH_LINE_LEFT if self.verdict is Verdict.EDGE else _BATCH_LINE
        if upper < 1.0 and value + 2 * error < line:
            return self._calm()
        if self._momentum == 0.0 and value >= line:
            return Verdict.EDGE, f"Batch sharpness is {value:.2f} of its line 2/lr, which marks the edge to a quarter."
        if self._momentum > 0.0:
            return Verdict.UNKNOWN, (
                "With momentum and small batches neither the edge ratio nor batch sharpness tells runs that fail from "
                "runs that hold."
            )
        return Verdict.UNKNOWN, f"Batch sharpness, {value:.2f} of its line, is too close to it for its error."

    def _calm(self) -> tuple[Verdict, str]:
        steps = self.steps_to_edge
        if steps is not None:
            return Verdict.SHARPENING, f"The curvature grows; at this pace the edge is {steps:.0f} steps away."
        return Verdict.STABLE, f"The edge ratio is {self._ratio:.2f}."

    def _dying_out(self) -> bool:
        edge = self._edge
        return self.oscillation.decaying and edge.rises == 0 and all(entry.ratio < 1.0 for entry in edge.entries[-4:])

    def _settle(self, step: int, verdict: Verdict, reason: str) -> None:
        """Go up at once, and down only after some steps."""
        if _LEVEL[verdict] >= _LEVEL[self.verdict]:
            self._level_held_at = step
        # DIVERGING and RESTRAINED have a memory of their own.
        at_once = self.verdict in (Verdict.DIVERGING, Verdict.RESTRAINED) or self._readings != "usable"
        if (
            _LEVEL[verdict] >= _LEVEL[self.verdict]
            or at_once
            or self.oscillation.still
            or not 0 <= step - self._level_held_at < _LOWER_AFTER
        ):
            self.verdict = verdict
            self.reason = reason
            self._level_held_at = step
