"""What schedulers will set, and the edge ratio there, before they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from eos_monitor.curvature.norms import quadratic_form
from eos_monitor.forecast.schedule_twin import ScheduleCopies, counters_of, join_alike, kept, numbers
from eos_monitor.isolation.sandbox import preserve_rng
from eos_monitor.isolation.twin import as_list
from eos_monitor.limits.edge_scale import Solve, bend
from eos_monitor.limits.thresholds import critical_curvature
from eos_monitor.readings.reading import Measurement, common_factor

# for each optimizer, for each group: what will be other than it is, as `critical_curvature(settings=…)` takes it
Settings = list[list[dict[str, Any]]]

_LONGEST = 64
_DEEPEST = 8  # wrappers around one scheduler
# The mode turns by about the bend, over the relative gap, and r changes by the square: below 1e-4, a hundredth of what
# a reading is asked for.
_SMALL_BEND = 1e-2


@dataclass(frozen=True)
class Scheduled:
    """A scheduler, and how often a loop steps it. Lightning's ``lr_scheduler_configs`` have the same fields.

    Attributes:
        scheduler: The live scheduler.
        interval: ``"step"`` (after optimizer steps) or ``"epoch"`` (after the last one of an epoch).
        frequency: Step it only where the number of batches in the epoch so far, or of epochs, is a multiple of this.
    """

    scheduler: Any
    interval: str = "step"
    frequency: int = 1


def scheduled(entry: Any) -> Any:
    """Return a scheduler as what the look-ahead takes.

    Accelerate's and others' wrappers hold it as ``scheduler``; Lightning's modules return a dictionary.
    """
    if isinstance(entry, Mapping):
        return Scheduled(entry["scheduler"], entry.get("interval", "epoch"), entry.get("frequency", 1))
    if hasattr(entry, "scheduler") and hasattr(entry, "interval"):
        return entry
    for _ in range(_DEEPEST):
        if isinstance(entry, LRScheduler) or not hasattr(entry, "scheduler"):
            break
        entry = entry.scheduler
    return Scheduled(entry)


class Position(NamedTuple):
    """Where in its epochs a loop is.

    Attributes:
        batch: Index of the micro-batch in the epoch; in a loop without epochs, of the step.
        epoch: Index of the epoch.
        batches: Micro-batches in an epoch; infinite where that is not known.
        accumulate: Micro-batches to one optimizer step; the last one of an epoch always steps.
    """

    batch: int
    epoch: int = 0
    batches: float = math.inf
    accumulate: int = 1

    def stepping(self) -> Position:
        """Return the position of the next optimizer step, this one included."""
        batch = (self.batch // self.accumulate + 1) * self.accumulate - 1
        batch = int(min(batch, max(self.batches - 1, self.batch)))
        return Position(batch, self.epoch, self.batches, self.accumulate)

    def following(self) -> Position:
        """Return the position of the optimizer step after the one that is taken here."""
        ends = self.batch + 1 >= self.batches
        batch = 0 if ends else self.batch + 1
        return Position(batch, self.epoch + ends, self.batches, self.accumulate).stepping()

    def moves(self, entry: Any) -> bool:
        """Whether a scheduler is stepped after the optimizer step that is taken here."""
        if entry.interval == "epoch":
            return self.batch + 1 >= self.batches and (self.epoch + 1) % entry.frequency == 0
        return bool((self.batch + 1) % entry.frequency == 0)


class SettingsAhead:
    """Settings that schedulers will have made n optimizer steps from now.

    They are read off a twin: copies of the schedulers, stepped on optimizers that have copied ``param_groups`` and
    neither parameters nor state. The twin runs many steps ahead at once; as long as the live settings and the
    schedulers' counters are those that it went through, :meth:`after` only looks them up. Settings made by hand, or a
    resumed state, start a new twin.

    Schedulers, the functions that they call (with their closures), callable objects, built-in containers, tensors and
    generators are copied. Other state that a function keeps (globals, objects behind a closure, modules) is shared: a
    schedule that advances a counter there is advanced by the twin.

    Args:
        schedulers: Schedulers stepped after each optimizer step, wrapped or not, or objects like :class:`Scheduled`.
            The sequence is kept, and read anew each time.
        optimizers: The optimizers in use.

    Attributes:
        why_not: Why there is no answer beyond the last step known, in words; None if nothing is in the way.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.4)
        >>> ahead = SettingsAhead([torch.optim.lr_scheduler.StepLR(sgd, step_size=2, gamma=0.5)], [sgd])
        >>> [ahead.after(n, Position(0))[0][0]["lr"] for n in (1, 2, 4)]
        [0.4, 0.2, 0.1]
    """

    def __init__(self, schedulers: Sequence[Any], optimizers: Sequence[Optimizer]) -> None:
        self._schedulers = schedulers
        self._optimizers = as_list(optimizers)
        self._run = _Run()
        self._run_of_first = _Run(first_only=True)
        self.why_not: str | None = None

    def after(self, n: int, position: Position) -> Settings | None:
        """Return what the settings will be after ``n`` more optimizer steps and what is scheduled between them.

        None if that cannot be known: a scheduler waits for a metric, is over by then, or its epoch has no known end.
        Each group has ``lr``, whatever else differs from now, and ``steps_ahead`` = n, by which the step count of an
        optimizer's state will have grown.

        Args:
            n: Optimizer steps, at least 0.
            position: That of the optimizer step to come; the schedulers have not been stepped after it yet.
        """
        if n < 0:
            raise ValueError(f"Expected `n` >= 0, got {n}.")
        position = position.stepping()
        entries = [scheduled(entry) for entry in self._schedulers]
        live = _State.live(self._optimizers, entries)
        block, index = self._reach(self._run, n, position, entries, lambda state: state == live)
        if index + n >= len(block):
            return None
        then = block[index + n]
        return [
            [
                {key: value for key, value in new.items() if key == "lr" or key not in old or value != old[key]}
                | {"steps_ahead": n}
                for new, old in zip(news, olds, strict=True)
            ]
            for news, olds in zip(then.groups, live.groups, strict=True)
        ]

    def rates(self, n: int, position: Position) -> list[float]:
        """Return the first learning rates after 1 … ``n`` more optimizer steps, as far as they are known.

        Whether other groups are where they were foreseen is left to :meth:`after`: this is asked at every step, and
        there may be many groups.

        Args:
            n: Optimizer steps.
            position: As for :meth:`after`.
        """
        position = position.stepping()
        entries = [scheduled(entry) for entry in self._schedulers]
        why_not = _why_not(entries, position)
        if why_not is not None:
            self.why_not = why_not
            return []
        counters = _all_counters(entries)
        rate = next(iter(_rates(self._optimizers)), None)
        block, index = self._reach(
            self._run_of_first,
            n,
            position,
            entries,
            lambda state: state.counters == counters and state.first_rate == rate,
        )
        rates = (state.first_rate for state in block[index + 1 : index + n + 1])
        return [rate for rate in rates if rate is not None]

    def _reach(
        self, run: _Run, n: int, position: Position, entries: Sequence[Any], is_live: Callable[[_State], bool]
    ) -> tuple[list[_State], int]:
        """Return a run of states and the index of the live one in it, ``n`` beyond which there are if known."""
        index = self._find(run, position, entries, is_live)
        if index is None:
            run.length = 1  # settings made by hand at each step must not cost a long run each
        elif index + n >= len(run.block) and run.why_not is None:
            run.length = min(_LONGEST, 2 * run.length)
            index = None
        if index is None:
            self._predict(run, position, entries, max(n, run.length))
            index = 0
        self.why_not = run.why_not
        return run.block, index

    def _find(
        self, run: _Run, position: Position, entries: Sequence[Any], is_live: Callable[[_State], bool]
    ) -> int | None:
        of = [entry.scheduler for entry in entries]
        if len(of) != len(run.of) or any(a is not b for a, b in zip(of, run.of, strict=True)):
            return None
        index = run.places.get(position)
        return index if index is not None and is_live(run.block[index]) else None

    def _predict(self, run: _Run, position: Position, entries: Sequence[Any], steps: int) -> None:
        run.of = [entry.scheduler for entry in entries]
        run.block = [_State.live(self._optimizers, entries)]
        run.places = {position: 0}
        run.why_not = _why_not(entries, position)
        if run.why_not is not None:
            return
        try:
            with preserve_rng():
                copies = ScheduleCopies({})
                twins = [copies.of(entry.scheduler) for entry in entries]
                optimizers = [copies.of(optimizer) for optimizer in self._optimizers]
                members = [join_alike(optimizer, twins, run.first_only) for optimizer in optimizers]
                for _ in range(steps):
                    for interval in ("step", "epoch"):
                        for entry, twin in zip(entries, twins, strict=True):
                            if entry.interval == interval and position.moves(entry):
                                twin.step()
                    position = position.following()
                    run.places[position] = len(run.block)
                    groups = [[kept(group) for group in optimizer.param_groups] for optimizer in optimizers]
                    run.block.append(_State(groups, [counters_of(twin) for twin in twins], members))
        except Exception as error:  # whatever a scheduler of the user's raises must not end the run now
            run.why_not = f"A scheduler cannot be stepped further: {error}"


def edge_ratio_at(
    measurement: Measurement, optimizers: Sequence[Optimizer], settings: Settings | None, solve: Solve | None = None
) -> float | None:
    """Return the edge ratio that a measurement would have at other settings, with the same Hessian.

    With r and its mode x, xᵀ C x = 1: r / (xᵀ C' x), which is exact where C' is a multiple of C. Where it bends by more
    than a hundredth, the eigenproblem is solved again; without ``solve``, and where the settings are not known, there
    is no edge, or the decay changes too, None.

    Args:
        measurement: The measurement.
        optimizers: The optimizers that it was taken of.
        settings: What will differ, from :meth:`SettingsAhead.after`.
        solve: Critical curvature -> edge ratio and mode there.
    """
    r = measurement.reading.edge_ratio
    mode = measurement.mode
    before = measurement.curvature
    if settings is None or r is None or mode is None or before.c is None:
        return None
    there = critical_curvature(optimizers, settings=settings)
    if there.c is None or not bool((there.c > 0.0).all()):
        return None
    if not bool(torch.isfinite(there.c).any()):
        return 0.0  # nothing will move
    s = common_factor(before, there)
    if s is not None:
        return s * r
    known = torch.isfinite(before.c)
    same = torch.equal(before.l2, there.l2) and torch.equal(known, torch.isfinite(there.c))
    if same and bend(before.c, there.c) <= _SMALL_BEND:
        return r / quadratic_form(there.c.to(mode.device), mode)
    return None if solve is None else solve(there)[0]


@dataclass
class _Run:
    """States that a twin went through, as many at once as the live settings have followed so far.

    Attributes:
        first_only: Whether nothing but the first learning rate is wanted, so that other groups may be left out.
        of: The schedulers that it is of.
        block: The states, one an optimizer step, the first as it was found.
        places: The index of each position.
        length: States that the next one is to have.
        why_not: Why it does not go on, in words; None if nothing is in the way.
    """

    first_only: bool = False
    of: list[Any] = field(default_factory=list)
    block: list[_State] = field(default_factory=list)
    places: dict[Position, int] = field(default_factory=dict)
    length: int = 1
    why_not: str | None = None


class _State:
    """What can be compared between the live schedulers and the twin.

    Args:
        groups: For each optimizer, the settings of its groups.
        counters: Of the schedulers.
        members: For each optimizer, which of ``groups`` stands for each group that there is.
    """

    def __init__(self, groups: list[list[dict[str, Any]]], counters: list[Any], members: list[list[int]]) -> None:
        self.counters = counters
        self._groups = groups
        self._members = members

    @staticmethod
    def live(optimizers: Sequence[Optimizer], entries: Sequence[Any]) -> _State:
        """Return the state of the moment."""
        groups = [[numbers(group) for group in optimizer.param_groups] for optimizer in optimizers]
        return _State(groups, _all_counters(entries), [list(range(len(one))) for one in groups])

    @cached_property
    def groups(self) -> list[list[dict[str, Any]]]:
        """For each optimizer, the numbers among the settings of each group."""
        plain = [[numbers(group) for group in groups] for groups in self._groups]
        return [[groups[i] for i in indices] for groups, indices in zip(plain, self._members, strict=True)]

    @property
    def first_rate(self) -> float | None:
        """The first learning rate; that which stands for the first group that has one is the first, too."""
        rates = (group["lr"] for groups in self._groups for group in groups if group.get("lr") is not None)
        rate = next(rates, None)
        return None if rate is None else float(rate)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _State) and self.counters == other.counters and self.groups == other.groups

    __hash__ = None  # type: ignore[assignment]


def _rates(optimizers: Sequence[Optimizer]) -> Iterator[float]:
    return (float(g["lr"]) for optimizer in optimizers for g in optimizer.param_groups if g.get("lr") is not None)


def _all_counters(entries: Sequence[Any]) -> list[Any]:
    return [counters_of(entry.scheduler) for entry in entries]


def _why_not(entries: Sequence[Any], position: Position) -> str | None:
    for entry in entries:
        name = type(entry.scheduler).__name__
        if isinstance(entry.scheduler, ReduceLROnPlateau) or getattr(entry, "reduce_on_plateau", False):
            return f"{name} waits for a metric."
        if entry.interval == "epoch" and position.batches == math.inf:
            return f"{name} is stepped at the end of an epoch whose length is not known."
    return None
