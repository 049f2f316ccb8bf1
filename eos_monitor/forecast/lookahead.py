"""What schedulers will set, and the edge ratio there, before they do."""

from __future__ import annotations

import copy
import functools
import math
import types
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from eos_monitor.curvature.norms import quadratic_form
from eos_monitor.isolation.copies import Copies
from eos_monitor.isolation.sandbox import preserve_rng
from eos_monitor.isolation.twin import as_list
from eos_monitor.isolation.wrappers import bare_optimizer
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
        self._of: list[Any] = []  # the schedulers that the block is of
        self._block: list[_State] = []  # one an optimizer step, the first as it was found
        self._places: dict[Position, int] = {}
        self._length = 1
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
        live, block, index = self._reach(n, position)
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

        Args:
            n: Optimizer steps.
            position: As for :meth:`after`.
        """
        _, block, index = self._reach(n, position)
        rates = (
            next((group["lr"] for groups in state.groups for group in groups if "lr" in group), None)
            for state in block[index + 1 : index + n + 1]
        )
        return [float(rate) for rate in rates if rate is not None]

    def _reach(self, n: int, position: Position) -> tuple[_State, list[_State], int]:
        """Return the live state, and a run of states of which that one is at the index, ``n`` beyond it if known."""
        position = position.stepping()
        entries = [scheduled(entry) for entry in self._schedulers]
        live = _State.of(self._optimizers, [entry.scheduler for entry in entries])
        index = self._find(position, live, entries)
        if index is None:
            self._length = 1  # settings made by hand at each step must not cost a long run each
        elif index + n >= len(self._block) and self.why_not is None:
            self._length = min(_LONGEST, 2 * self._length)
            index = None
        if index is None:
            self._predict(position, live, entries, max(n, self._length))
            index = 0
        return live, self._block, index

    def _find(self, position: Position, live: _State, entries: Sequence[Any]) -> int | None:
        of = [entry.scheduler for entry in entries]
        if len(of) != len(self._of) or any(a is not b for a, b in zip(of, self._of, strict=True)):
            return None
        index = self._places.get(position)
        return index if index is not None and self._block[index] == live else None

    def _predict(self, position: Position, live: _State, entries: Sequence[Any], steps: int) -> None:
        self._of = [entry.scheduler for entry in entries]
        self._block = [live]
        self._places = {position: 0}
        self.why_not = _why_not(entries, position)
        if self.why_not is not None:
            return
        try:
            with preserve_rng():
                copies = _ScheduleCopies({})
                twins = [copies.of(entry.scheduler) for entry in entries]
                optimizers = [copies.of(optimizer) for optimizer in self._optimizers]
                for _ in range(steps):
                    for interval in ("step", "epoch"):
                        for entry, twin in zip(entries, twins, strict=True):
                            if entry.interval == interval and position.moves(entry):
                                twin.step()
                    position = position.following()
                    self._places[position] = len(self._block)
                    self._block.append(_State.of(optimizers, twins))
        except Exception as error:  # whatever a scheduler of the user's raises must not end the run now
            self.why_not = f"A scheduler cannot be stepped further: {error}"


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


@dataclass(frozen=True)
class _State:
    """What can be compared between the live schedulers and the twin."""

    groups: list[list[dict[str, Any]]]
    counters: list[Any]

    @staticmethod
    def of(optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> _State:
        groups = [[_numbers(group) for group in optimizer.param_groups] for optimizer in optimizers]
        return _State(groups, [_counters(scheduler) for scheduler in schedulers])


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    numbers = {}
    for key, value in group.items():
        kind = type(value)
        # Nearly all there is, asked first: this runs for each group at each step.
        if kind is float or kind is bool or kind is int:
            numbers[key] = value
        elif value is not None and key not in ("params", "param_names"):
            several = isinstance(value, (tuple, list))
            plain = [
                float(x) if isinstance(x, Tensor) and x.numel() == 1 else x for x in (value if several else (value,))
            ]
            if all([isinstance(x, (int, float)) for x in plain]):
                numbers[key] = tuple(plain) if several else plain[0]
    return numbers


def _counters(scheduler: Any) -> list[Any]:
    own = vars(scheduler)
    nested = [_counters(scheduler) for scheduler in own.get("_schedulers", ())]
    return [own.get("last_epoch"), own.get("_step_count"), own.get("T_cur"), own.get("T_i"), *nested]


def _why_not(entries: Sequence[Any], position: Position) -> str | None:
    for entry in entries:
        name = type(entry.scheduler).__name__
        if isinstance(entry.scheduler, ReduceLROnPlateau) or getattr(entry, "reduce_on_plateau", False):
            return f"{name} waits for a metric."
        if entry.interval == "epoch" and position.batches == math.inf:
            return f"{name} is stepped at the end of an epoch whose length is not known."
    return None


class _ScheduleCopies(Copies):
    """Copies of what a schedule can change by being stepped.

    Not by copy.deepcopy: it keeps functions with their closures, and follows a bound method to the whole module.
    """

    def _other(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return value
        if isinstance(value, Optimizer):
            return self._optimizer(value)
        if isinstance(value, (list, dict, deque)):  # subclasses
            return self._container(value)
        if isinstance(value, set):
            return copy.copy(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, functools.partial):
            return functools.partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        if hasattr(value, "__dict__") and (isinstance(value, LRScheduler) or callable(value) or hasattr(value, "step")):
            duplicate = copy.copy(value)
            self._memo[id(value)] = duplicate
            duplicate.__dict__.update({key: self.of(item) for key, item in vars(value).items()})
            return duplicate
        return value

    def _optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return an optimizer of the same class with the same settings, no parameters, and no state."""
        bare = bare_optimizer(optimizer)
        if bare is not optimizer:  # a scheduler may have been given the wrapper
            return self.of(bare)  # type: ignore[no-any-return]
        twin = type(optimizer).__new__(type(optimizer))
        self._memo[id(optimizer)] = twin

        def step() -> None:
            """Schedulers look whether the optimizer's step is wrapped and was called."""

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        twin.__dict__.update(
            defaults=self.of(optimizer.defaults),
            state=defaultdict(dict),
            param_groups=[
                {key: [] if key == "params" else self.of(item) for key, item in group.items()}
                for group in optimizer.param_groups
            ],
            step=step,
            _opt_called=True,
        )
        return twin

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = function.__closure__ or ()
        fresh = tuple(self._memo.setdefault(id(cell), types.CellType()) for cell in cells)
        duplicate = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, fresh)
        self._memo[id(function)] = duplicate  # before what it holds: a function can be in its own closure
        duplicate.__defaults__ = self.of(function.__defaults__)
        duplicate.__kwdefaults__ = self.of(function.__kwdefaults__)
        duplicate.__dict__.update(self.of(vars(function)))
        for cell, new in zip(cells, fresh, strict=True):
            try:
                new.cell_contents = self.of(cell.cell_contents)
            except ValueError:  # a name that is not bound yet
                continue
        return duplicate
