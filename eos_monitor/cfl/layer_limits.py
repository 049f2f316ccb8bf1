"""What an optimizer asks of one layer: its critical curvature there, and the learning rate at which it is met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.optim import Optimizer

from eos_monitor.limits.edge_scale import shortened
from eos_monitor.limits.thresholds import CriticalCurvature, critical_curvature, has_learning_rate

_DEAD = 1e-12  # a critical curvature below this share of the median counts as this share


@dataclass(frozen=True)
class LayerLimit:
    """One weight's part of C and W.

    Attributes:
        scale: Diagonal of C^-½, ``(n,)``, or ``(1,)`` where it is one number; 0 where there is no threshold.
        l2: Coupled weight decay, ``(n,)`` or ``(1,)``.
        sign: −1 where the loss is maximized.
        lr: Learning rate of the weight's group; None without an optimizer.
        threshold: Limit of lr·λ_max(P⁻¹(H + W)), None if the groups have none in common.
        law: ``(a, b)`` with c(t·lr) = c · (a/t + b); None if c does not follow such a law.
    """

    scale: Tensor
    l2: Tensor
    sign: int
    lr: float | None
    threshold: float | None
    law: tuple[float, float] | None

    def curvature(self, r: float) -> float:
        """Return λ_max of the block from that of C^-½ (H + W) C^-½: preconditioned, if C is not one number."""
        if self.lr is None:
            return r
        if len(self.scale) == len(self.l2) == 1:
            return r / float(self.scale) ** 2 - float(self.l2)
        return math.nan if self.threshold is None else r * self.threshold / self.lr

    def lr_max(self, r: float) -> float | None:
        """Return the learning rate at which r would be 1; infinite where no rate is too high, None if not known."""
        if self.lr is None:
            return 2.0 / r if r > 0.0 else math.inf  # plain gradient descent
        if self.law is None:
            return None
        a, b = self.law
        # r = a/t + b
        return self.lr * a / (r - b) if r > b else math.inf


class LayerLimits:
    """Limits of all trained weights; plain gradient descent of an unknown learning rate without an optimizer.

    Args:
        optimizers: The optimizers in use.

    Attributes:
        why_not: Why the optimizers have no limits, in words; empty if they have.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._at: CriticalCurvature | None = None
        self.why_not = ""
        self._slices: dict[int, slice] = {}
        self._lr: dict[int, float] = {}
        self._twice: Tensor | None = None  # c at twice the learning rates
        self._half: Tensor | None = None  # and at half of them
        if not optimizers:
            return
        self._at = critical_curvature(optimizers)
        self._twice = critical_curvature(optimizers, lr_scale=2.0).c
        self._half = critical_curvature(optimizers, lr_scale=0.5).c
        sizes = [p.numel() for p in self._at.params]
        for p, end, size in zip(self._at.params, accumulate(sizes), sizes, strict=True):
            self._slices[id(p)] = slice(end - size, end)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                lr = float(group["lr"]) if has_learning_rate(group) else math.nan
                self._lr |= dict.fromkeys(map(id, group["params"]), lr)
        self.why_not = _why_not(self._at)

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The trained parameters in the order of vectors; none without an optimizer."""
        return () if self._at is None else self._at.params

    def trains(self, parameter: Tensor) -> bool:
        """Whether the parameter is trained."""
        return parameter.requires_grad and (self._at is None or id(parameter) in self._slices)

    def of(self, parameter: Tensor) -> LayerLimit | None:
        """Return a weight's limit; None if the optimizer has none, or none yet."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        one = torch.ones(1, dtype=dtype, device=parameter.device)
        if self._at is None:
            return LayerLimit(one, torch.zeros_like(one), 1, None, 2.0, None)
        if self.why_not or self._at.c is None:
            return None
        part = self._slices[id(parameter)]
        c = shortened(self._at.c[part]).to(parameter.device)
        l2 = shortened(self._at.l2[part]).to(parameter.device)
        if not bool(torch.isfinite(c).any()):
            return None
        if len(c) > 1:  # dead units leave Adam's c near zero; so does the curvature there
            c = c.clamp(min=_DEAD * float(c[torch.isfinite(c)].median()))
        law = None
        if self._twice is not None and self._half is not None:
            law = _law(self._at.c[part].double(), self._twice[part].double(), self._half[part].double())
        return LayerLimit(
            c.rsqrt().to(dtype), l2.to(dtype), self._at.sign, self._lr[id(parameter)], self._at.threshold, law
        )


def _law(now: Tensor, twice: Tensor, half: Tensor) -> tuple[float, float] | None:
    """Return ``(a, b)`` with c(t·lr) = c · (a/t + b), from c now, at twice and at half the learning rate."""
    finite = torch.isfinite(now)
    low2, high2 = map(float, torch.aminmax(twice[finite] / now[finite]))
    low, high = map(float, torch.aminmax(half[finite] / now[finite]))
    # a/2 + b at twice the rate and a + b = 1 now; at half the rate it must be 2a + b.
    a = 2.0 * (1.0 - high2)
    b = 1.0 - a
    follows = all(abs(x - (2.0 * a + b)) <= 1e-6 * abs(x) for x in (low, high)) and high2 - low2 <= 1e-6 * high2
    if abs(b) < 5e-7:  # rounding of c ∝ 1/lr
        a = 1.0
        b = 0.0
    return (a, b) if follows and a > 0.0 else None


def _why_not(at: CriticalCurvature) -> str:
    if at.c is None:
        return f"no known threshold for {', '.join(at.without_threshold) or 'this optimizer'}"
    return "" if at.ready else "the optimizer's state is too young"
