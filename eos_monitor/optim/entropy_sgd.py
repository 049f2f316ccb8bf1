"""Entropy-SGD: gradient descent on the local entropy of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eos_monitor.limits.thresholds import Limit, register_critical_curvature
from eos_monitor.optim.relaxation import Closure, Part, Relaxation, descend
from eos_monitor.optim.response import NOTE, first_unstable, sgd_limit


class EntropySGD(Relaxation):
    """Descend the local entropy, the viscous Hamilton–Jacobi equation's solution at time γ from the loss f.

    A step starts an inner loop at y = z = x, takes L evaluations ``g`` of the gradient, each followed by
    ``y ← y − η′(g(y) + (y − x)/γ) + √(2η′T)·N(0, 1)`` and ``z ← αz + (1 − α)y``, and ends with
    ``x ← x − (η/γ)(x − z)``; then ``γ ← (1 − scoping)·γ``. With η = γ, x becomes z.

    Args:
        params: Parameters or parameter groups.
        lr: Step size η ≥ 0 of x.
        inner_lr: Step size η′ ≥ 0 of y.
        gamma: Width γ > 0 of the smoothing.
        averaging: α in [0, 1), the memory of z.
        evaluations: L ≥ 1, the evaluations in a step.
        temperature: T ≥ 0 of the thermal noise: long inner loops sample exp(−(f(y) + |y − x|²/2γ)/T).
        inner_momentum: Heavy-ball momentum of y in [0, 1), at rest at the start of each inner loop.
        weight_decay: Coupled weight decay, part of f and so taken at y.
        scoping: Share of γ that is lost with each step; the paper's is 1e-3.
        generator: Source of the noise.
        foreach: Whether to use torch's multi-tensor kernels; by default where SGD does.

    Raises:
        ValueError: If a setting is out of range.

    Note:
        The paper's noise is √(η′β⁻¹)·N(0, 1), which samples exp(−2β(…)): its β⁻¹ is 2T. Scoping raises η/γ, and above
        2 (with the paper's 1e-3 after 700 steps from η = γ) modes that the inner loop settles diverge; later the inner
        loop does, at η′/γ = 2. It is off by default: with it, let ``lr`` decay as fast. One evaluation without
        averaging, at ``lr == gamma`` and without scoping, is SGD with ``inner_lr``.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> optimizer = EntropySGD([x], lr=1.0, inner_lr=0.1, evaluations=2, averaging=0.5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * x.square().sum()  # in training: of the next mini-batch
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item(), round(x.item(), 6)
        (0.5, 0.885)

    References:
        Chaudhari, Oberman, Osher, Soatto, Carlier, "Deep relaxation", 2017, arXiv 1704.04932, section 6.1.
    """

    _noise_settings = ("temperature",)

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        inner_lr: float = 0.1,
        gamma: float = 1.0,
        averaging: float = 0.75,
        evaluations: int = 20,
        temperature: float = 0.0,
        inner_momentum: float = 0.0,
        weight_decay: float = 0.0,
        scoping: float = 0.0,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            inner_lr=inner_lr,
            gamma=gamma,
            averaging=averaging,
            evaluations=evaluations,
            temperature=temperature,
            inner_momentum=inner_momentum,
            weight_decay=weight_decay,
            scoping=scoping,
            foreach=foreach,
        )
        super().__init__(params, defaults, generator)

    @classmethod
    def as_published(cls, params: Any, *, gamma: float = 1.0, **settings: Any) -> EntropySGD:
        """Return the optimizer with the paper's settings: η = γ, η′ = 0.1, α = 0.75, L = 20, scoping 1e-3, no noise.

        Let ``lr`` decay at least as fast as γ: at a constant one their ratio passes 2 after 700 steps, see the note.

        Args:
            params: Parameters or parameter groups.
            gamma: γ, which the paper chose by the validation error; at least 0.05 for the inner loop to be stable.
            settings: What differs, as in the constructor.
        """
        published = {"lr": gamma, "inner_lr": 0.1, "averaging": 0.75, "evaluations": 20, "scoping": 1e-3}
        return cls(params, gamma=gamma, **(published | settings))

    def inner_limit(self, group: Mapping[str, Any]) -> float:
        """Return 2(1 + μ)/η′ − 1/γ."""
        return sgd_limit(float(group["inner_lr"]), group["inner_momentum"]) - 1 / float(group["gamma"])

    def _relax(self, closure: Closure, parts: Sequence[Part]) -> None:
        averages = [[x.clone() for x in part.anchors] for part in parts]
        buffers: list[list[Tensor | None]] = [[None] * len(part.params) for part in parts]
        for number in range(self.closure_calls):
            self._evaluate(closure, number)
            for part, average, buffer in zip(parts, averages, buffers, strict=True):
                group = part.group
                descend(part, buffer, lr=group["inner_lr"], momentum=group["inner_momentum"])
                for p, z in zip(part.params, average, strict=True):
                    if group["temperature"] and p.grad is not None:
                        p.add_(self._noise(p), alpha=math.sqrt(2 * float(group["inner_lr"]) * group["temperature"]))
                    z.lerp_(p, 1 - group["averaging"])  # exact where p is z
        for part, average in zip(parts, averages, strict=True):
            for p, x, z in zip(part.params, part.anchors, average, strict=True):
                p.copy_(x.lerp(z, float(part.group["lr"]) / part.group["gamma"]))


@register_critical_curvature(EntropySGD)
def _entropy_sgd(group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]) -> Limit:
    """On a quadratic a step multiplies each mode by 1 − (η/γ)(1 − z/x), here followed through the inner loop.

    Exact for the full batch, no noise, and one group: in other bases than the Hessian's, groups do not commute.
    """
    keys = ("lr", "inner_lr", "gamma", "averaging", "evaluations", "inner_momentum")
    return Limit(_critical(*(group[key] for key in keys)), group["weight_decay"], note=NOTE)


@lru_cache(maxsize=64)
def _critical(
    lr: float, inner_lr: float, gamma: float, averaging: float, evaluations: int, inner_momentum: float
) -> float:
    if lr == 0 or inner_lr == 0:
        return math.inf

    def unstable(curvature: Tensor) -> Tensor:
        y = torch.ones_like(curvature)
        z = y
        velocity = torch.zeros_like(curvature)
        for _ in range(evaluations):
            velocity = inner_momentum * velocity + curvature * y + (y - 1) / gamma
            y = y - inner_lr * velocity
            z = averaging * z + (1 - averaging) * y
        # z < 1 and its factor above −1; written so that an overflow is unstable
        return ~((1 - z > 0) & (lr / gamma * (1 - z) < 2))

    return first_unstable(unstable, 1 / inner_lr)
