"""Factors on the learning rates of a run, so that a fast rise does not carry it beyond its edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from eos_monitor.limits.edge_scale import shortened
from eos_monitor.readings.reading import Measurement
from eos_monitor.verdicts.jump_risk import JumpRisk, class_of, cut_of
from eos_monitor.verdicts.steps import kind_of

_OF_CUT = 0.5
_BACK_OFF = 0.5
_T = TypeVar("_T")
Place = tuple[int, int]  # of a group: the optimizer's index, and its own


@dataclass(frozen=True)
class Cap:
    """Learning rates that were lowered.

    Attributes:
        groups: Indices of the groups.
        before: What the schedule says, of all groups.
        after: What the step is to use, of all groups.
        ratio: Edge ratio at ``before``; None if not known.
        target: Edge ratio that is aimed at; None for a plain cut.
    """

    groups: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    ratio: float | None
    target: float | None


class LrGovernor:
    """Factors on the scheduled learning rates of each step; it changes nothing itself.

    A rise of a group's scheduled learning rate that :class:`JumpRisk` calls a risk puts that group under a cap: from
    that very step on its factor keeps the edge ratio at ``target``. For ``cooldown`` steps the learning rate in use
    does not rise, and then it at most doubles in as many, as long as the ratio stays below; once it is the schedule's
    again the cap is gone. :meth:`lower` sets a ceiling on the factors of all groups, which stays, and from then on all
    are capped, however slowly the ratio rises.

    With w_g the share of group g in xᵀ C x, x the critical mode of the last reading and l_g the learning rates as
    multiples of those of the reading, r(f) = r / Σ w_g / (l_g f_g): exact where all factors are equal and c ∝ 1/lr,
    else a lower bound for an unchanged Hessian, corrected by the next reading.

    Args:
        target: Edge ratio to aim at, > 0; None for half of the class's line, see :class:`JumpRisk`, and at most
            the edge: the line is where failures begin, and half of what heavy ball is given there fails.
        floor: Smallest factor, in (0, 1].
        cooldown: Steps, ≥ 1.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, target: float | None = None, floor: float = 1e-3, cooldown: int = 64) -> None:
        if target is not None and not 0.0 < target < math.inf:
            raise ValueError(f"Expected an edge ratio > 0 to aim at, or None, got {target}.")
        if not 0.0 < floor <= 1.0:
            raise ValueError(f"Expected a smallest factor in (0, 1], got {floor}.")
        if cooldown < 1:
            raise ValueError(f"Expected a cooldown of at least 1 step, got {cooldown}.")
        self._target = target
        self._floor = floor
        self._cooldown = cooldown
        self._places: tuple[Place, ...] = ()
        self._jumps: list[JumpRisk] = []
        self._caps: list[float | None] = []  # of each group; None without one
        self._ceiling = 1.0
        self._used: list[float] = []  # learning rates of the last step
        self._at: int | None = None  # step of the last event
        self._ratio: float | None = None  # of the last reading, at _rates
        self._rates: tuple[float, ...] = ()
        self._shares: tuple[float, ...] = ()
        self._kind = ""

    @property
    def factors(self) -> tuple[float, ...]:
        """Factor on the learning rate of each group, in ``param_groups`` order; empty before the first step."""
        return tuple(min(self._ceiling, 1.0 if cap is None else cap) for cap in self._caps)

    @property
    def caps(self) -> tuple[float | None, ...]:
        """Factor that each group is capped by; None without a cap."""
        return tuple(self._caps)

    @property
    def caps_by_place(self) -> dict[Place, float | None]:
        """Factor that each group is capped by, by its place."""
        return dict(zip(self._places, self._caps, strict=True))

    @property
    def exhausted(self) -> bool:
        """Whether the ceiling is at the floor, so that nothing can be lowered any more."""
        return self._ceiling <= self._floor

    def measured(self, measurement: Measurement | None, optimizers: Sequence[Any]) -> None:
        """Take in a reading; None forgets the last."""
        self._ratio = None
        if measurement is None or measurement.mode is None or measurement.curvature.c is None:
            return
        reading = measurement.reading
        if reading.edge_ratio is None or not 0.0 < reading.edge_ratio < math.inf or not reading.converged:
            return
        self._ratio = reading.edge_ratio
        self._rates = tuple(reading.lr)
        self._shares = _shares(measurement, optimizers)
        self._kind = class_of(**kind_of(optimizers), full_batch=bool(reading.full_batch))

    def ratio(self, rates: Sequence[float]) -> float | None:
        """Return the edge ratio at other learning rates, by the last reading; None if that is not known."""
        return self._ratio_at(rates, (1.0,) * len(rates), 1.0)

    def decide(
        self, step: int, rates: Sequence[float], correction: float = 1.0, places: Sequence[Place] | None = None
    ) -> Cap | None:
        """Set the factors of the update of ``step``; return what a new event has lowered, None without one.

        Args:
            step: Optimizer step.
            rates: Scheduled learning rate of each group.
            correction: Factor on the edge ratio, for what else has changed since the reading.
            places: Where each group is, so that caps stay with their groups when some are added; None for all in one
                optimizer.
        """
        self._align(rates, places)
        scheduled = self._ratio_at(rates, (1.0,) * len(rates), correction)
        in_effect = self._ratio_at(rates, self.factors, correction)
        risen = []
        for g, (jump, rate) in enumerate(zip(self._jumps, rates, strict=True)):
            known = jump.ratio
            jump.add(step, rate, None, in_effect, self._kind)
            if jump.ratio is not None and jump.ratio != known and self._caps[g] is None:
                risen.append(g)
                self._caps[g] = 1.0
        if risen:
            self._at = step
        self._caps = [
            cap if g in risen else self._slowly(step, g, rate)
            for g, (cap, rate) in enumerate(zip(self._caps, rates, strict=True))
        ]
        self._lower_to_target(rates, correction)
        self._used = [rate * factor for rate, factor in zip(rates, self.factors, strict=True)]
        if not risen:
            full = 1.0 if self._ceiling < 1.0 else None
            self._caps = [full if cap is not None and cap >= 1.0 else cap for cap in self._caps]
            return None
        return self._cap(risen, rates, scheduled, self._target_ratio())

    def lower(
        self,
        step: int,
        rates: Sequence[float],
        caps: Mapping[Place, float | None] | None = None,
        places: Sequence[Place] | None = None,
    ) -> Cap:
        """Lower all learning rates for good: to half, and to the target where a ratio is known.

        Args:
            step: Optimizer step.
            rates: Scheduled learning rate of each group.
            caps: :attr:`caps_by_place` of the state that the run goes back to: those since have followed what went
                wrong.
            places: As for :meth:`decide`.
        """
        self._align(rates, places)
        before = [(caps or {}).get(place) for place in self._places]
        self._caps = [1.0 if cap is None else cap for cap in before]
        found = self._ratio_at(rates, self.factors, 1.0)
        target = None if found is None else self._target_ratio()
        enough = 1.0 if found is None or target is None else target / found
        self._ceiling = max(self._floor, min(self.factors, default=1.0) * min(_BACK_OFF, enough))
        self._at = step
        self._used = []
        return self._cap(range(len(rates)), rates, self.ratio(rates), target)

    def release(self) -> None:
        """Take all caps and the ceiling back."""
        self._caps = [None] * len(self._caps)
        self._ceiling = 1.0
        self._at = None
        self._used = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state, without the reading, as plain Python values."""
        return {
            "places": [list(place) for place in self._places],
            "caps": list(self._caps),
            "ceiling": self._ceiling,
            "used": list(self._used),
            "at": self._at,
            "jumps": [jump.state_dict() for jump in self._jumps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._places = tuple((o, g) for o, g in state["places"])
        self._caps = list(state["caps"])
        self._ceiling = state["ceiling"]
        self._at = state["at"]
        self._used = list(state["used"])
        self._jumps = [JumpRisk() for _ in state["jumps"]]
        for jump, saved in zip(self._jumps, state["jumps"], strict=True):
            jump.load_state_dict(saved)

    def _align(self, rates: Sequence[float], places: Sequence[Place] | None) -> None:
        """Keep what is known of each group with it where groups were added or taken away; a new one has no cap."""
        now = tuple((0, g) for g in range(len(rates))) if places is None else tuple(places)
        if now == self._places:
            return
        before = {place: i for i, place in enumerate(self._places)}

        def moved(values: Sequence[_T], fresh: Callable[[], _T]) -> list[_T]:
            return [values[before[place]] if place in before else fresh() for place in now]

        full = 1.0 if self._ceiling < 1.0 else None
        self._caps = moved(self._caps, lambda: full)
        self._jumps = moved(self._jumps, JumpRisk)
        self._used = moved(self._used, lambda: math.inf) if self._used else []
        self._places = now

    def _slowly(self, step: int, g: int, rate: float) -> float | None:
        """Return a cap at which the learning rate that is used stays for a cooldown, and then doubles in each."""
        cap = self._caps[g]
        if cap is None or g >= len(self._used) or rate <= 0.0:
            return cap
        waiting = self._at is not None and step - self._at < self._cooldown
        return self._used[g] * (1.0 if waiting else 2.0 ** (1.0 / self._cooldown)) / rate

    def _target_ratio(self) -> float:
        return min(1.0, _OF_CUT * cut_of(self._kind)) if self._target is None else self._target

    def _lower_to_target(self, rates: Sequence[float], correction: float) -> None:
        """Lower the capped groups together, until the edge ratio is the target."""
        terms = self._terms(rates, self.factors)
        if self._ratio is None or not terms:
            return
        capped = sum(term for term, cap in zip(terms, self._caps, strict=True) if cap is not None)
        needed = correction * self._ratio / self._target_ratio() - (sum(terms) - capped)
        if 0.0 < capped < needed:
            factor = capped / needed
            self._caps = [
                None if cap is None else max(self._floor, min(cap, self._ceiling) * factor) for cap in self._caps
            ]

    def _ratio_at(self, rates: Sequence[float], factors: Sequence[float], correction: float) -> float | None:
        terms = self._terms(rates, factors)
        return correction * self._ratio / sum(terms) if terms and self._ratio is not None else None

    def _terms(self, rates: Sequence[float], factors: Sequence[float]) -> list[float]:
        """Return w / (l f) of each group; nothing where the reading does not fit."""
        if self._ratio is None or not len(rates) == len(self._rates) == len(self._shares) == len(factors):
            return []
        return [
            0.0 if share == 0.0 else share * before / (rate * factor) if rate * factor > 0.0 else math.inf
            for share, before, rate, factor in zip(self._shares, self._rates, rates, factors, strict=True)
        ]

    def _cap(self, groups: Sequence[int], rates: Sequence[float], ratio: float | None, target: float | None) -> Cap:
        after = tuple(rate * factor for rate, factor in zip(rates, self.factors, strict=True))
        return Cap(tuple(groups), tuple(rates), after, ratio, target)


def _shares(measurement: Measurement, optimizers: Sequence[Any]) -> tuple[float, ...]:
    """Return the share of each group in xᵀ C x; groups without a threshold have none."""
    mode = measurement.mode
    c = measurement.curvature.c
    assert mode is not None
    assert c is not None
    sizes = {id(p): p.numel() for p in measurement.curvature.params}
    counts = [
        sum(sizes.get(id(p), 0) for p in group["params"])
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    if sum(counts) != len(mode):
        return ()
    parts = [
        _form(x, d) for x, d in zip(torch.split(mode, counts), torch.split(c.to(mode.device), counts), strict=True)
    ]
    total = sum(parts)
    return tuple(part / total for part in parts) if total > 0.0 else ()


def _form(x: Tensor, c: Tensor) -> float:
    if not len(x):
        return 0.0
    weights = x.double().square()
    return float(torch.where(weights > 0.0, weights * shortened(c).double(), 0.0).sum())
