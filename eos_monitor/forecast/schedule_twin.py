"""Copies of schedules that may be stepped ahead, with one parameter group for all that are scheduled alike."""

from __future__ import annotations

import copy
import functools
import types
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from eos_monitor.isolation.copies import Copies
from eos_monitor.isolation.wrappers import bare_optimizer

# Schedules whose groups do not know of one another, and that call nothing of the user's for each of them: a function
# that counts its calls must be called as often.
_SEPARABLE = (
    *(lr_scheduler.StepLR, lr_scheduler.MultiStepLR, lr_scheduler.ConstantLR, lr_scheduler.LinearLR),
    *(lr_scheduler.ExponentialLR, lr_scheduler.PolynomialLR, lr_scheduler.CosineAnnealingLR),
    *(lr_scheduler.CosineAnnealingWarmRestarts, lr_scheduler.OneCycleLR),
    *(lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler),
)
_BY_GROUP = ("base_lrs", "_last_lr")


def numbers(group: dict[str, Any]) -> dict[str, Any]:
    """Return what of a parameter group's settings is a number, or a tuple of them, as plain values."""
    found = {}
    for key, value in group.items():
        kind = type(value)
        # Nearly all there is, asked first.
        if kind is float or kind is bool or kind is int:
            found[key] = value
        elif value is not None and key not in ("params", "param_names"):
            several = isinstance(value, (tuple, list))
            plain = [
                float(x) if isinstance(x, Tensor) and x.numel() == 1 else x for x in (value if several else (value,))
            ]
            if all([isinstance(x, (int, float)) for x in plain]):
                found[key] = tuple(plain) if several else plain[0]
    return found


def kept(group: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter group's settings as they are now: schedules may write into tensors and lists in place."""
    written = any(type(value) in (Tensor, list) and key != "params" for key, value in group.items())
    return numbers(group) if written else group.copy()


def counters_of(scheduler: Any) -> list[Any]:
    """Return how far a scheduler is."""
    own = vars(scheduler)
    nested = [counters_of(scheduler) for scheduler in own.get("_schedulers", ())]
    return [own.get("last_epoch"), own.get("_step_count"), own.get("T_cur"), own.get("T_i"), *nested]


def join_alike(optimizer: Optimizer, schedulers: Sequence[Any], first_only: bool = False) -> list[int]:
    """Leave a copied optimizer one parameter group for all that are scheduled alike.

    Args:
        optimizer: The copy.
        schedulers: Copies of all schedulers.
        first_only: Whether the first group that has a learning rate may stand for all the others.

    Returns:
        For each group that there was, the number of the one that now stands for it.
    """
    groups = optimizer.param_groups
    own = [s for s in _with_parts(schedulers) if getattr(s, "optimizer", None) is optimizer]
    lists = [(s, name, vars(s)[name]) for s in own for name in _BY_GROUP if name in vars(s)]
    separable = all(type(s) in _SEPARABLE for s in own) and all(len(values) == len(groups) for _, _, values in lists)
    if not own or not separable or any(type(value) is Tensor for group in groups for value in group.values()):
        return list(range(len(groups)))
    first: dict[Any, int] = {}
    members = []
    keep: list[int] = []
    for i, group in enumerate(groups):
        key = (
            "all"
            if first_only and group.get("lr") is not None
            else (repr(sorted(numbers(group).items())), repr([values[i] for _, _, values in lists]))
        )
        if key not in first:
            first[key] = len(keep)
            keep.append(i)
        members.append(first[key])
    optimizer.param_groups = [groups[i] for i in keep]
    for scheduler, name, values in lists:
        setattr(scheduler, name, [values[i] for i in keep])
    return members


def _with_parts(schedulers: Sequence[Any]) -> Iterator[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _with_parts(vars(scheduler).get("_schedulers", ()))


class ScheduleCopies(Copies):
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
