"""The curvature that an optimizer can bear, read from its live state.

For each coordinate, the critical curvature c is the h at which that coordinate alone, on ½ h x², with the optimizer's
present state frozen, loses stability. With C = diag(c) and W the coupled weight decay, the full-batch edge of any mix
of groups is ``λ_max(C^-½ (H + W) C^-½) = 1``, crossed by a flip: the unstable mode changes sign at every step.

Here is the contract; the formulas are in ``rules`` (torch.optim) and ``neighbours`` (other libraries), which the
package ``eos_monitor.limits`` loads.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from eos_monitor.curvature.norms import quadratic_form
from eos_monitor.isolation.twin import as_list

Group = Mapping[str, Any]
State = Mapping[str, Any]


class Limit(NamedTuple):
    """Critical curvature of one parameter's coordinates.

    Attributes:
        c: Critical curvature, a scalar or of the parameter's shape.
        l2: Coupled weight decay, which adds to the curvature.
        threshold: ``c · lr / P``, the limit of lr·λ_max(P⁻¹(H + W)) with P the optimizer's preconditioner; None if
            c is not of that form.
        ready: False while the state is too young to mean anything.
        note: What a reader must know beside the number.
    """

    c: float | Tensor
    l2: float | Tensor = 0.0
    threshold: float | None = None
    ready: bool = True
    note: str | None = None


Rule = Callable[[Group, Tensor, State], Any]
_R = TypeVar("_R", bound=Rule)
_RULES: dict[type[Optimizer], Rule] = {}
_ALIKE = 1.01  # thresholds of groups up to this factor apart are one number


class Source(NamedTuple):
    """Rule and state by which an optimizer is read.

    Attributes:
        rule: What gives the critical curvature of a parameter; None if nothing is known.
        state: Where each parameter's state is.
        attributes: Settings that the optimizer keeps beside its groups.
        note: What a reader must know beside the numbers.
    """

    rule: Rule | None
    state: Mapping[Tensor, Any]
    attributes: Mapping[str, Any] = {}
    note: str | None = None


Finder = Callable[[Optimizer], Source | None]
_FINDERS: list[Finder] = []


@dataclass(frozen=True)
class CriticalCurvature:
    """Critical curvature of every coordinate that some optimizers train.

    Attributes:
        c: Critical curvature, positive; infinite where the optimizer has no threshold, so that these coordinates drop
            out of C^-½ (H + W) C^-½. None if no coordinate has one.
        l2: Coupled weight decay, the diagonal of W.
        threshold: Common limit of lr·λ_max(P⁻¹(H + W)); None where groups differ or have none.
        params: The parameters in ``param_groups`` order, each once: the order of all vectors.
        names: One name for each parameter.
        sign: −1 where the loss is maximized (its curvature counts negatively), else 1.
        ready: Whether every adaptive state is old enough: more than max(10, 3/(1 − β1)) steps.
        without_threshold: Names of the optimizers without a known threshold, with a word why where it is known.
        notes: What a reader must know beside the numbers, in words.
        thresholds: Limit of each parameter; None where it has none.
    """

    c: Tensor | None  # (n,)
    l2: Tensor  # (n,)
    threshold: float | None
    params: tuple[Tensor, ...]
    names: tuple[str, ...]
    sign: int = 1
    ready: bool = True
    without_threshold: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    thresholds: tuple[float | None, ...] = ()

    def threshold_along(self, mode: Tensor) -> float | None:
        """Return the common threshold, or the mean of thresholds that agree within 1 %, weighted by their mode's share.

        Those of AdamW's groups with decay and without differ by lr·wd/2 or so.

        Args:
            mode: Critical mode x, ``(n,)``; the share of a coordinate is cᵢ xᵢ².
        """
        known = [threshold for threshold in self.thresholds if threshold is not None]
        if self.threshold is not None or self.without_threshold or not known or self.c is None:
            return self.threshold
        if not 0.0 < max(known) <= _ALIKE * min(known):
            return None
        total = 0.0
        weighted = 0.0
        stop = 0
        runs = groupby(zip(self.thresholds, self.params, strict=True), key=lambda pair: pair[0])
        for threshold, members in runs:
            start = stop
            stop += sum(p.numel() for _, p in members)
            if threshold is not None:
                share = quadratic_form(self.c[start:stop].to(mode.device), mode[start:stop])
                total += share
                weighted += share * threshold
        return weighted / total if total > 0.0 else None


def register_critical_curvature(optimizer_class: type[Optimizer]) -> Callable[[_R], _R]:
    """Decorate the rule that gives the critical curvature of ``optimizer_class`` (and of its subclasses).

    The rule is called as ``rule(group, param, state)`` with one of the optimizer's ``param_groups`` (its ``lr``,
    ``momentum``, ``betas`` … as plain floats), a parameter, and ``optimizer.state[param]`` (empty before the first
    step). It returns c, or ``(c, l2)``, or ``(c, l2, threshold)``, each of the first two a number or a tensor of the
    parameter's shape; None while the state says nothing yet; a string, the word why, where there is no threshold.
    c is the edge of one coordinate alone, with its adaptive state as it stands. With a preconditioner P, decoupled
    decay wd and momentum that answers a gradient which changes sign at every step by T times that gradient, it is
    ``(2 − lr·wd)·P/(lr·T)``: T = 1 without momentum, (1−β)/(1+β) for an average with weight β.

    :func:`check_critical_curvature` holds a rule against the optimizer itself.

    Raises:
        TypeError: If ``optimizer_class`` is not a class of optimizers.

    Example:
        >>> import torch
        >>> class HalfStep(torch.optim.SGD):  # steps by lr / 2
        ...     pass
        >>> @register_critical_curvature(HalfStep)
        ... def half_step(group, param, state):
        ...     return 4 / group["lr"]
        >>> critical_curvature(HalfStep([torch.nn.Parameter(torch.ones(2))], lr=0.1)).c
        tensor([40., 40.])
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"Expected a subclass of torch.optim.Optimizer, got {optimizer_class!r}.")

    def register(rule: _R) -> _R:
        _RULES[optimizer_class] = rule
        return rule

    return register


def register_finder(find: Finder) -> None:
    """Ask a function, after those registered before it, how to read an optimizer whose class has no rule."""
    _FINDERS.append(find)


def critical_curvature(
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    lr_scale: float = 1.0,
    settings: Sequence[Sequence[Group]] | None = None,
) -> CriticalCurvature:
    """Read the critical curvature of every trained coordinate from one or several optimizers.

    An optimizer that is neither registered nor recognized (``limits.neighbours``) has no threshold: nothing is
    guessed. Where the state is adaptive, what is read is the edge at that state: it moves with it.

    Args:
        optimizers: One optimizer or several, which then count as one operator.
        lr_scale: Factor on all learning rates at which to read it; the optimizers keep theirs.
        settings: For each optimizer and each of its groups, what a scheduler will change (``lr``, ``momentum``,
            ``betas`` …), to read the critical curvature ahead of time; ``steps_ahead`` moves the state's step counts
            on, all else as it stands.

    Raises:
        ValueError: If there is no trainable parameter, a parameter is in two optimizers, or some groups minimize the
            loss while others maximize it (that is a game, and has no symmetric operator).

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> curvature = critical_curvature(torch.optim.SGD([p], lr=0.1, momentum=0.9))
        >>> curvature.c, round(curvature.threshold, 6)
        (tensor([38., 38.]), 3.8)
    """
    several = as_list(optimizers)
    entries = list(_entries(several, lr_scale, settings))
    if not entries:
        raise ValueError("Expected an optimizer with trainable parameters, got none.")
    limits = [entry.limit for entry in entries]
    known = [limit for limit in limits if limit is not None]
    signs = {-1 if entry.maximize else 1 for entry in entries if entry.limit is not None}
    if len(signs) > 1:
        raise ValueError("Expected groups that all minimize or all maximize the loss, got both: a game has no edge.")
    params = tuple(entry.param for entry in entries)
    # An Adam parameter that never had a gradient has no state; like a group without a rule it drops out. An optimizer
    # that has no state at all has not begun.
    begun = {entry.position for entry in entries if entry.begun or entry.limit is not None or entry.unlimited}
    unknown = sorted({entry.unlimited for entry in entries if entry.unlimited})
    notes = [entry.note for entry in entries] + [limit.note for limit in known]
    thresholds = {limit.threshold for limit in known}
    return CriticalCurvature(
        c=_flat([math.inf if limit is None else limit.c for limit in limits], params) if known else None,
        l2=_flat([0.0 if limit is None else limit.l2 for limit in limits], params),
        threshold=thresholds.pop() if len(thresholds) == 1 and not unknown else None,
        params=params,
        names=tuple(entry.name for entry in entries),
        sign=signs.pop() if signs else 1,
        ready=all(limit.ready for limit in known) and all(entry.position in begun for entry in entries),
        without_threshold=tuple(unknown),
        notes=tuple(dict.fromkeys(note for note in notes if note)),
        thresholds=tuple(None if limit is None else limit.threshold for limit in limits),
    )


def learning_rates(optimizers: Sequence[Optimizer]) -> tuple[float, ...]:
    """Return the learning rate of every parameter group that has one, in order."""
    return tuple(
        float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups if has_learning_rate(group)
    )


def has_learning_rate(group: Group) -> bool:
    """Whether a group has a learning rate: some optimizers set their own, and have none or None there."""
    return group.get("lr") is not None


class _Entry(NamedTuple):
    param: Tensor
    name: str
    position: int  # of the optimizer
    begun: bool  # whether the optimizer has any state
    limit: Limit | None  # None too while a parameter has no state yet
    unlimited: str | None  # the optimizer's name, with a word why, where there is no threshold
    maximize: bool
    note: str | None


def _entries(
    optimizers: Sequence[Optimizer], lr_scale: float, ahead: Sequence[Sequence[Group]] | None
) -> Iterable[_Entry]:
    seen: dict[int, str] = {}
    for o, optimizer in enumerate(optimizers):
        source = source_of(optimizer)
        kind = type(optimizer).__name__
        for g, group in enumerate(optimizer.param_groups):
            settings = {**source.attributes, **_plain(group), **(_plain(ahead[o][g]) if ahead is not None else {})}
            if has_learning_rate(settings):
                settings["lr"] *= lr_scale
            for i, param in enumerate(group["params"]):
                if not param.requires_grad:
                    continue
                names = group.get("param_names")
                name = names[i] if names else f"optimizer {o}, group {g}, parameter {i}"
                if id(param) in seen:
                    raise ValueError(f"Expected each parameter in one place, got {name!r} also as {seen[id(param)]!r}.")
                seen[id(param)] = name
                # .get: looking a parameter up in the defaultdict would create its state.
                state = _later(source.state.get(param, {}), settings.get("steps_ahead", 0))
                limit = _limit(source.rule, settings, param, state)
                yield _Entry(
                    param=param,
                    name=name,
                    position=o,
                    begun=bool(source.state),
                    limit=None if isinstance(limit, str) else limit,
                    unlimited=(f"{kind} ({limit})" if limit else kind) if isinstance(limit, str) else None,
                    maximize=bool(settings.get("maximize")),
                    note=source.note,
                )


def steps_as(optimizer: Optimizer, cls: type[Optimizer]) -> bool:
    """Whether an optimizer steps as ``cls`` does: a subclass with a step of its own is another optimizer."""
    # Unwrapped, because torch wraps `step` in a profiler hook.
    return isinstance(optimizer, cls) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(cls.step)


def source_of(optimizer: Optimizer) -> Source:
    """Return how an optimizer is read: by the rule of its class, or as what it wraps or resembles."""
    cls = next((cls for cls in type(optimizer).__mro__ if cls in _RULES), None)
    if cls is not None and steps_as(optimizer, cls):
        return Source(_RULES[cls], optimizer.state)
    found = (find(optimizer) for find in _FINDERS)
    return next((source for source in found if source is not None), Source(None, optimizer.state))


def _later(state: State, steps: int) -> State:
    """Return a parameter's state with its step count moved on, all else as it stands."""
    return {**state, "step": float(state["step"]) + steps} if steps and "step" in state else state


def _limit(rule: Rule | None, group: Group, param: Tensor, state: State) -> Limit | str | None:
    found = "" if rule is None else rule(group, param, state)
    if found is None or isinstance(found, (str, Limit)):
        return found
    return Limit(*found) if isinstance(found, tuple) else Limit(found)


def _plain(group: Group) -> dict[str, Any]:
    """Return the settings of a group with tensors (lr, betas) as floats."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value)
        return tuple(plain(item) for item in value) if isinstance(value, (tuple, list)) else value

    return {key: plain(value) for key, value in group.items() if key not in ("params", "param_names")}


def _flat(values: Sequence[float | Tensor], params: Sequence[Tensor]) -> Tensor:
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    sizes = [p.numel() for p in params]
    flat = torch.empty(sum(sizes), dtype=dtype, device=params[0].device)
    for piece, value, p in zip(torch.split(flat, sizes), values, params, strict=True):
        # as_tensor would round a float to single precision.
        if isinstance(value, (float, int)):
            piece.fill_(value)
        else:
            piece.view(p.shape).copy_(torch.as_tensor(value, device=p.device).detach())
    return flat
