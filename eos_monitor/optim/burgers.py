"""The optimizer that follows a viscous Burgers equation, read as traffic flow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eos_monitor.limits.thresholds import Limit, register_critical_curvature
from eos_monitor.optim.relaxation import Closure, Part, Relaxation, descend, put
from eos_monitor.optim.response import NOTE, first_unstable, grows, sgd_limit, spring_map


class BurgersSGD(Relaxation):
    """Follow the gradient of the local entropy, which solves a viscous Burgers equation, by one long inner run.

    A step continues y where the last one left it, takes L evaluations ``g`` of the gradient, each followed by
    ``y ← y − δ(g(y) + (y − x)/γ) + √(2νδ)·N(0, 1)``, and ends with ``x ← x − (δ/γ)(x − y)``; then
    ``γ ← (1 − scoping)·γ``. The parameters hold x between steps; y is neither reset nor averaged.

    Args:
        params: Parameters or parameter groups.
        lr: Step size δ ≥ 0, of y and of x.
        gamma: Width γ > 0 of the smoothing, the time of the equation.
        viscosity: ν ≥ 0: y samples exp(−(f(y) + |y − x|²/2γ)/ν), by noise of √(2νδ). The mean drift w = E(x − y)/γ
            then solves w_t + w·w_x = (ν/2)·w_xx, at time t = γ from w = f′. For the equation with ν itself, that is
            noise of √(4νδ), pass 2ν.
        evaluations: L ≥ 1, the evaluations in a step.
        inner_momentum: Heavy-ball momentum of y in [0, 1).
        weight_decay: Coupled weight decay, part of f and so taken at y.
        scoping: Share of γ that is lost with each step.
        generator: Source of the noise.
        foreach: Whether to use torch's multi-tensor kernels; by default where SGD does.

    Raises:
        ValueError: If a setting is out of range.

    Note:
        Departs from the paper where its text cannot be meant: x moves after every L evaluations (with the paper's
        "k mod N" it would move once in all), the noise has √δ once, and it samples exp(−F/ν), not exp(−F/2ν). Near
        δ/γ = 2 the last y swings with period 2, which nothing averages out: keep γ well above δ. At
        ``lr == gamma`` without noise, one evaluation is SGD.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> optimizer = BurgersSGD([x], lr=0.5, gamma=1.0, evaluations=1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * x.square().sum()  # in training: of the next mini-batch
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item(), x.item()  # y = 1/2
        (0.5, 0.75)

    References:
        Adeoye, Petersen, "A deep neural network optimization method via a traffic flow model", equations 5.18, 5.19.
    """

    _noise_settings = ("viscosity",)
    _remedy = "Lower lr or raise gamma."

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        *,
        gamma: float = 1.0,
        viscosity: float = 0.0,
        evaluations: int = 5,
        inner_momentum: float = 0.0,
        weight_decay: float = 0.0,
        scoping: float = 0.0,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            gamma=gamma,
            viscosity=viscosity,
            evaluations=evaluations,
            inner_momentum=inner_momentum,
            weight_decay=weight_decay,
            scoping=scoping,
            foreach=foreach,
        )
        super().__init__(params, defaults, generator)

    def inner_limit(self, group: Mapping[str, Any]) -> float:
        """Return 2(1 + μ)/δ − 1/γ."""
        return sgd_limit(float(group["lr"]), group["inner_momentum"]) - 1 / float(group["gamma"])

    def _relax(self, closure: Closure, parts: Sequence[Part]) -> None:
        buffers = [self._buffers(part.params) for part in parts]
        for part in parts:
            put(part.params, [self.state[p].get("y", x) for p, x in zip(part.params, part.anchors, strict=True)])
        for number in range(self.closure_calls):
            self._evaluate(closure, number)
            for part, buffer in zip(parts, buffers, strict=True):
                group = part.group
                descend(part, buffer, lr=group["lr"], momentum=group["inner_momentum"])
                if group["viscosity"]:
                    for p in (p for p in part.params if p.grad is not None):
                        p.add_(self._noise(p), alpha=math.sqrt(2 * group["viscosity"] * float(group["lr"])))
        for part, buffer in zip(parts, buffers, strict=True):
            for p, x, velocity in zip(part.params, part.anchors, buffer, strict=True):
                self.state[p]["y"] = p.clone()
                if velocity is not None:
                    self.state[p]["momentum_buffer"] = velocity
                p.copy_(x.lerp(p, float(part.group["lr"]) / part.group["gamma"]))


@register_critical_curvature(BurgersSGD)
def _burgers(group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]) -> Limit:
    """On a quadratic a step is a linear map of x, y and velocity in each mode, here followed through its evaluations.

    Exact for the full batch, no noise, and one group: in other bases than the Hessian's, groups do not commute.
    """
    keys = ("lr", "gamma", "evaluations", "inner_momentum")
    return Limit(_critical(*(group[key] for key in keys)), group["weight_decay"], note=NOTE)


@lru_cache(maxsize=64)
def _critical(lr: float, gamma: float, evaluations: int, inner_momentum: float) -> float:
    if lr == 0:
        return math.inf
    return first_unstable(
        lambda curvature: grows(
            spring_map(curvature, lr=lr, gamma=gamma, evaluations=evaluations, momentum=inner_momentum, pull=lr / gamma)
        ),
        1 / lr,
    )
