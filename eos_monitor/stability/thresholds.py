"""The curvature that an optimizer can bear, read from its live state.

For each coordinate, the critical curvature c is the h at which that coordinate alone, on ½ h x², with the optimizer's
present state frozen, loses stability. With C = diag(c) and W the coupled weight decay, the full-batch edge of any mix
of groups is ``λ_max(C^-½ (H + W) C^-½) = 1``, crossed by a flip: the unstable mode changes sign at every step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = Mapping[str, Any]
_O = TypeVar("_O", bound=type[Optimizer])


class Limit(NamedTuple):
    """Critical curvature of one parameter's coordinates.

    Attributes:
        c: Critical curvature, a scalar or of the parameter's shape.
        l2: Coupled weight decay, which adds to the curvature.
        threshold: ``c · lr / P``, the limit of lr·λ_max(P⁻¹(H + W)) with P the optimizer's preconditioner; None if
            c is not of that form.
        ready: False while the state is too young to mean anything.
    """

    c: float | Tensor
    l2: float | Tensor = 0.0
    threshold: float | None = None
    ready: bool = True


Rule = Callable[[Group, Tensor, Mapping[str, Any]], Any]
_RULES: dict[type[Optimizer], Rule] = {}


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
        without_threshold: Names of the optimizers without a known threshold, in words.
    """

    c: Tensor | None  # (n,)
    l2: Tensor  # (n,)
    threshold: float | None
    params: tuple[Tensor, ...]
    names: tuple[str, ...]
    sign: int = 1
    ready: bool = True
    without_threshold: tuple[str, ...] = ()


def register_critical_curvature(optimizer_class: _O) -> Callable[[Rule], Rule]:
    """Decorate the rule that gives the critical curvature of ``optimizer_class`` (and of its subclasses).

    The rule is called as ``rule(group, param, state)`` with one of the optimizer's ``param_groups`` (its ``lr``,
    ``momentum``, ``betas`` … as plain floats), a parameter, and ``optimizer.state[param]`` (empty before the first
    step). It returns c, or ``(c, l2)``, or ``(c, l2, threshold)``, each of the first two a number or a tensor of the
    parameter's shape; None where there is no threshold.

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

    def register(rule: Rule) -> Rule:
        _RULES[optimizer_class] = rule
        return rule

    return register


def critical_curvature(
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    lr_scale: float = 1.0,
    settings: Sequence[Sequence[Group]] | None = None,
) -> CriticalCurvature:
    """Read the critical curvature of every trained coordinate from one or several optimizers.

    An optimizer that is not registered has no threshold: nothing is guessed.

    Args:
        optimizers: One optimizer or several, which then count as one operator.
        lr_scale: Factor on all learning rates at which to read it; the optimizers keep theirs.
        settings: For each optimizer and each of its groups, what a scheduler will change (``lr``, ``momentum``,
            ``betas`` …), to read the critical curvature ahead of time.

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
    several = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
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
    begun = {entry.position for entry in entries if entry.begun or entry.limit is not None or not entry.known}
    unknown = sorted({entry.optimizer for entry in entries if not entry.known})
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
    )


def learning_rates(optimizers: Sequence[Optimizer]) -> tuple[float, ...]:
    """Return the learning rate of every parameter group, in order."""
    return tuple(float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups if "lr" in group)


class _Entry(NamedTuple):
    param: Tensor
    name: str
    optimizer: str
    position: int  # of the optimizer
    begun: bool  # whether the optimizer has any state
    limit: Limit | None
    known: bool  # whether the optimizer has a rule, even if this parameter has no state yet
    maximize: bool


def _entries(
    optimizers: Sequence[Optimizer], lr_scale: float, ahead: Sequence[Sequence[Group]] | None
) -> Iterable[_Entry]:
    seen: dict[int, str] = {}
    for o, optimizer in enumerate(optimizers):
        rule = _rule_of(optimizer)
        for g, group in enumerate(optimizer.param_groups):
            settings = _plain(group) | (_plain(ahead[o][g]) if ahead is not None else {})
            if "lr" in settings:
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
                limit = _limit(rule, settings, param, optimizer.state.get(param, {})) if rule else None
                yield _Entry(
                    param=param,
                    name=name,
                    optimizer=type(optimizer).__name__,
                    position=o,
                    begun=bool(optimizer.state),
                    limit=limit,
                    known=rule is not None,
                    maximize=bool(settings.get("maximize")),
                )


def _rule_of(optimizer: Optimizer) -> Rule | None:
    cls = next((cls for cls in type(optimizer).__mro__ if cls in _RULES), None)
    # A subclass with a step of its own is another optimizer. Unwrapped, because torch wraps `step` in a profiler hook.
    if cls is None or inspect.unwrap(type(optimizer).step) is not inspect.unwrap(cls.step):
        return None
    return _RULES[cls]


def _limit(rule: Rule, group: Group, param: Tensor, state: Mapping[str, Any]) -> Limit | None:
    found = rule(group, param, state)
    if found is None:
        return None
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
            piece.view(p.shape).copy_(torch.as_tensor(value).detach())
    return flat


@register_critical_curvature(torch.optim.SGD)
def _sgd(group: Group, param: Tensor, state: Mapping[str, Any]) -> Limit:
    """2(1+γ)/(1−d) for heavy ball with dampening, (2+2γ)/(1+2γ) for Nesterov (Cohen et al. 2021, arXiv 2103.00065)."""
    momentum = group["momentum"]
    if group["nesterov"]:
        threshold = (2 + 2 * momentum) / (1 + 2 * momentum)
    elif momentum:
        threshold = 2 * (1 + momentum) / (1 - group["dampening"]) if group["dampening"] < 1 else math.inf
    else:
        threshold = 2.0  # dampening has no effect without momentum
    return Limit(_over_lr(threshold, group), group["weight_decay"], threshold)


@register_critical_curvature(torch.optim.AdamW)
@register_critical_curvature(torch.optim.Adam)
def _adam(group: Group, param: Tensor, state: Mapping[str, Any]) -> Limit | None:
    """(2+2β1)/(1−β1)·(1−β1ᵗ)·P/η with P frozen (Cohen et al. 2022, arXiv 2207.14484; bias corrections included)."""
    if "exp_avg_sq" not in state:
        return None
    beta1, beta2 = group["betas"]
    steps = float(state["step"])
    t = steps + 1  # the step to come, with v as it stands
    second_moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    preconditioner = second_moment.double().sqrt() / math.sqrt(1 - beta2**t) + group["eps"]
    threshold = 2 * (1 + beta1) / (1 - beta1) * (1 - beta1**t)
    l2 = group["weight_decay"]
    if group.get("decoupled_weight_decay"):
        threshold, l2 = threshold * (1 - group["lr"] * group["weight_decay"] / 2), 0.0
    c = _over_lr(1.0, group) * threshold * preconditioner
    return Limit(c, l2, threshold, ready=steps > max(10.0, 3 / (1 - beta1)))


def _over_lr(threshold: float, group: Group) -> float:
    return threshold / group["lr"] if group["lr"] > 0 else math.inf
