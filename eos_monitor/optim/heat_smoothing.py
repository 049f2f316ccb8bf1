"""Gradient descent on the loss smoothed by the heat equation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eos_monitor.limits.thresholds import Limit, register_critical_curvature
from eos_monitor.optim.relaxation import Closure, Part, Relaxation, gradient, put
from eos_monitor.optim.response import sgd_limit


class HeatSmoothing(Relaxation):
    """Descend the convolution of the loss with a Gaussian of variance γ, the heat equation's solution at time γ.

    A step averages L gradients at ``x + √γ·N(0, 1)`` and ends with SGD's step on them,
    ``x ← x − (η/L)·Σ g(x + √γ·N)``; then ``γ ← (1 − scoping)·γ``.

    Args:
        params: Parameters or parameter groups.
        lr: Step size η ≥ 0.
        gamma: Variance γ ≥ 0 of the perturbations of the weights, σ².
        evaluations: L ≥ 1, the evaluations in a step.
        momentum: SGD's momentum on the smoothed gradient, in [0, 1).
        nesterov: Whether it is Nesterov's.
        weight_decay: Coupled weight decay, taken at x: smoothing changes |x|² by a constant only.
        scoping: Share of γ that is lost with each step; the paper's is 1e-3.
        generator: Source of the perturbations.
        foreach: Whether to use torch's multi-tensor kernels; by default where SGD does.

    Raises:
        ValueError: If a setting is out of range.

    Note:
        One evaluation with ``gamma=0`` is SGD.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> optimizer = HeatSmoothing([x], lr=0.5, gamma=0.0, evaluations=2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * x.square().sum()  # in training: of the next mini-batch
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item(), x.item()
        (0.5, 0.5)

    References:
        Chaudhari, Oberman, Osher, Soatto, Carlier, "Deep relaxation", 2017, arXiv 1704.04932, equation 26.
    """

    _noise_settings = ("gamma",)
    _ranges = {"gamma": ("a number >= 0", lambda v: 0 <= v < math.inf)}

    def __init__(
        self,
        params: Any,
        lr: float = 0.5,
        *,
        gamma: float = 1e-4,
        evaluations: int = 5,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        scoping: float = 0.0,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            gamma=gamma,
            evaluations=evaluations,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            scoping=scoping,
            foreach=foreach,
        )
        super().__init__(params, defaults, generator)

    def _relax(self, closure: Closure, parts: Sequence[Part]) -> None:
        sums: dict[Tensor, Tensor] = {}
        for number in range(self.closure_calls):
            for part in parts:
                for p, x in zip(part.params, part.anchors, strict=True):
                    if part.group["gamma"]:
                        torch.add(x, self._noise(x), alpha=math.sqrt(part.group["gamma"]), out=p)
            self._evaluate(closure, number)
            for p in (p for part in parts for p in part.params if p.grad is not None):
                sums[p] = sums[p] + gradient(p, 0.0) if p in sums else gradient(p, 0.0).clone()
        for part in parts:
            put(part.params, part.anchors)
            used = [p for p in part.params if p in sums]
            means = [sums[p] / self.closure_calls for p in used]
            self._sgd(part.group, used, means, weight_decay=part.group["weight_decay"])


@register_critical_curvature(HeatSmoothing)
def _heat_smoothing(group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]) -> Limit:
    """SGD's: on a quadratic the perturbations add noise to the gradient, and nothing else."""
    c = sgd_limit(group["lr"], group["momentum"], group["nesterov"])
    return Limit(c, group["weight_decay"], c * group["lr"] if group["lr"] else None)
