"""Gradient descent on the loss smoothed by the Hamilton–Jacobi equation without viscosity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eos_monitor.limits.thresholds import Limit, register_critical_curvature
from eos_monitor.optim.relaxation import Closure, Part, Relaxation, gradient, put
from eos_monitor.optim.response import NOTE, first_unstable, sgd_limit


class HamiltonJacobi(Relaxation):
    """Descend the inf-convolution of the loss f with |x|²/(2γ); an approximate proximal point iteration.

    A step starts with p = 0, takes L evaluations ``p ← αp + (1 − α)·g(x − γp)`` of the gradient, and ends with SGD's
    step on p, ``x ← x − ηp``; then ``γ ← (1 − scoping)·γ``.

    Args:
        params: Parameters or parameter groups.
        lr: Step size η ≥ 0.
        gamma: Width γ > 0 of the smoothing.
        averaging: α in [0, 1), the damping of p.
        evaluations: L ≥ 1, the evaluations in a step.
        momentum: SGD's momentum on the smoothed gradient, in [0, 1).
        nesterov: Whether it is Nesterov's.
        weight_decay: Coupled weight decay, part of f and so taken at x − γp.
        scoping: Share of γ that is lost with each step; the paper's is 1e-3.
        foreach: Whether to use torch's multi-tensor kernels; by default where SGD does.

    Raises:
        ValueError: If a setting is out of range.

    Note:
        As in the paper, p starts at zero and so reaches only the share 1 − αᴸ of a constant gradient (0.76 with the
        defaults). The inner loop needs γλ < (1 + α)/(1 − α), 7 with the default. One evaluation with
        ``averaging=0`` is SGD.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> optimizer = HamiltonJacobi([x], lr=0.5, gamma=1.0, averaging=0.5, evaluations=2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * x.square().sum()  # in training: of the next mini-batch
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item(), x.item()  # p = 1/2, then 1/4 + (1 − 1/2)/2 = 1/2
        (0.5, 0.75)

    References:
        Chaudhari, Oberman, Osher, Soatto, Carlier, "Deep relaxation", 2017, arXiv 1704.04932, section 6.2.
    """

    _remedy = "Lower gamma or raise averaging."

    def __init__(
        self,
        params: Any,
        lr: float = 0.5,
        *,
        gamma: float = 1.0,
        averaging: float = 0.75,
        evaluations: int = 5,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        scoping: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            gamma=gamma,
            averaging=averaging,
            evaluations=evaluations,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            scoping=scoping,
            foreach=foreach,
        )
        super().__init__(params, defaults)

    def inner_limit(self, group: Mapping[str, Any]) -> float:
        """Return (1 + α)/((1 − α)γ); a single evaluation is at x and has no limit."""
        if group["evaluations"] == 1:
            return math.inf
        return float((1 + group["averaging"]) / ((1 - group["averaging"]) * group["gamma"]))

    def _relax(self, closure: Closure, parts: Sequence[Part]) -> None:
        smoothed = [[torch.zeros_like(x) for x in part.anchors] for part in parts]
        used: set[Tensor] = set()
        for number in range(self.closure_calls):
            self._evaluate(closure, number)
            for part, momenta in zip(parts, smoothed, strict=True):
                group = part.group
                for p, x, momentum in zip(part.params, part.anchors, momenta, strict=True):
                    if p.grad is not None:
                        used.add(p)
                        momentum.lerp_(gradient(p, group["weight_decay"]), 1 - group["averaging"])
                    torch.sub(x, momentum, alpha=group["gamma"], out=p)
        for part, momenta in zip(parts, smoothed, strict=True):
            put(part.params, part.anchors)
            kept = [(p, momentum) for p, momentum in zip(part.params, momenta, strict=True) if p in used]
            self._sgd(part.group, [p for p, _ in kept], [momentum for _, momentum in kept], weight_decay=0.0)


@register_critical_curvature(HamiltonJacobi)
def _hamilton_jacobi(group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]) -> Limit:
    """On a quadratic p = s(λ)·x with s = λ/(1 + γλ)·(1 − ρᴸ), ρ = α − (1 − α)γλ, and SGD bears 0 < s < its own limit.

    Exact for the full batch and one group: in other bases than the Hessian's, groups do not commute.
    """
    keys = ("lr", "gamma", "averaging", "evaluations", "momentum", "nesterov")
    return Limit(_critical(*(group[key] for key in keys)), group["weight_decay"], note=NOTE)


@lru_cache(maxsize=64)
def _critical(lr: float, gamma: float, averaging: float, evaluations: int, momentum: float, nesterov: bool) -> float:
    if lr == 0:
        return math.inf
    bearable = sgd_limit(lr, momentum, nesterov)

    def unstable(curvature: Tensor) -> Tensor:
        rho = averaging - (1 - averaging) * gamma * curvature
        response = curvature / (1 + gamma * curvature) * (1 - rho**evaluations)
        return ~((response > 0) & (response < bearable))

    return first_unstable(unstable, 1 / lr)
