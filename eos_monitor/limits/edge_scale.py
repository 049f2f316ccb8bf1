"""The factor on all learning rates at which an optimizer would be at its edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from eos_monitor.curvature.norms import quadratic_form
from eos_monitor.limits.thresholds import CriticalCurvature, critical_curvature

_SOLVES = 12

# critical curvature -> (edge ratio there, its mode x in parameter space with xᵀ C x = 1)
Solve = Callable[[CriticalCurvature], tuple[float, Tensor]]


def edge_scale(
    r: float,
    mode: Tensor,
    curvature: CriticalCurvature,
    optimizers: Sequence[Optimizer],
    solve: Solve,
    rtol: float,
) -> float | None:
    """Solve r(s) = 1 for the common factor s on all learning rates; None if none is found.

    With x the critical mode, scaled so that xᵀ C x = 1 and xᵀ (H + W) x = r, the edge is at xᵀ C(s) x = r: exactly
    where C(s) is a multiple of C, as it is for c ∝ 1/lr. Decoupled decay in some groups only bends C; where that could
    matter at ``rtol``, the eigenproblem is solved again at the s so found.
    """
    if r <= 0.0:
        return None
    s = 1.0
    low = 0.0  # r grows with s: the edge is between low and high
    high = math.inf
    for _ in range(_SOLVES):
        if r < 1.0:
            low = s
        else:
            high = s
        found = edge_scale_along(mode, r, optimizers, s=s)
        if found is None:
            return None
        if not low <= found <= high:
            found = (low + high) / 2 if high < math.inf else 2 * low
        there = critical_curvature(optimizers, lr_scale=found)
        while there.c is not None and float(there.c.min()) <= 0.0:  # the decay alone is unstable there
            high = found
            found = (low + high) / 2
            there = critical_curvature(optimizers, lr_scale=found)
        if there.c is None or curvature.c is None:
            return None
        # The mode turns by about the bend, over the relative gap, and r changes by the square.
        if bend(curvature.c, there.c) ** 2 <= 1e-2 * rtol:
            return found
        r, mode = solve(there)
        s = found
        curvature = there
    return None


def shortened(values: Tensor) -> Tensor:
    """Return one entry, ``(1,)``, for all of them where they are equal."""
    least, most = torch.aminmax(values)
    return values[:1] if bool(least == most) else values


def edge_scale_along(mode: Tensor, r: float, optimizers: Sequence[Optimizer], *, s: float = 1.0) -> float | None:
    """Solve xᵀ C(t) x = r for the factor t, x with xᵀ C(s) x = 1: the edge as if the mode stayed the same.

    By secants of t·(xᵀ C(t) x − r), which is linear in t for SGD and Adam, decay included.
    """
    rounding = max(4 * torch.finfo(mode.dtype).eps, 1e-12)

    def miss(t: float) -> float:
        c = critical_curvature(optimizers, lr_scale=t).c
        return math.nan if c is None else t * (quadratic_form(shortened(c.to(mode.device)), mode) / r - 1)

    b = s / r
    miss_b = miss(b)
    if abs(miss_b) <= rounding * b:
        return b
    a = b / 2
    miss_a = miss(a)
    for _ in range(8):
        if miss_a == miss_b:
            return None
        root = b - miss_b * (b - a) / (miss_b - miss_a)
        a = b
        miss_a = miss_b
        b = root
        if not 0.0 < b < math.inf:
            return None
        miss_b = miss(b)
        if abs(miss_b) <= rounding * b or abs(b - a) <= rounding * b:
            return b
    return b


def bend(c: Tensor, other: Tensor) -> float:
    """Return how far one is from a multiple of the other, relatively, where they are finite."""
    c = shortened(c)
    other = shortened(other)
    if len(c) == len(other) == 1:
        return 0.0
    factors = c / other
    least, most = (float(bound) for bound in torch.aminmax(factors[torch.isfinite(factors)]))
    return most / least - 1
