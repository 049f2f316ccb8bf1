"""The smallest curvature at which a linear iteration is unstable."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

NOTE = "edge of the step with full batches and without noise; with several groups, approximate"
_POINTS = 512


def first_unstable(unstable: Callable[[Tensor], Tensor], scale: float) -> float:
    """Return the smallest curvature λ > 0 with ``unstable(λ)``, to twelve digits.

    The response of L evaluations is a polynomial of degree L, stable on islands too: hence a scan from zero on.

    Args:
        unstable: Maps curvatures ``(m,)``, float64, to truth values ``(m,)``.
        scale: Order of magnitude of the answer.
    """
    high = 4 * scale
    for _ in range(60):
        found = _scan(unstable, 0.0, high)
        if found is not None:
            break
        high *= 4
    else:
        return math.inf
    low, high = found
    while high - low > 1e-12 * high:
        low, high = _scan(unstable, low, high) or (low, high)
        if high < 1e-12 * scale:  # unstable from zero on
            break
    return high


def _scan(unstable: Callable[[Tensor], Tensor], low: float, high: float) -> tuple[float, float] | None:
    points = torch.linspace(low, high, _POINTS + 1, dtype=torch.float64)
    hits = unstable(points[1:]).nonzero()
    if not len(hits):
        return None
    first = int(hits[0])
    return float(points[first]), float(points[first + 1])


def grows(maps: Tensor) -> Tensor:
    """Return which of the matrices ``(m, k, k)`` have an eigenvalue outside the unit circle."""
    finite = torch.isfinite(maps).flatten(1).all(1)
    radius = torch.linalg.eigvals(torch.where(finite[:, None, None], maps, 0.0)).abs().amax(1)
    # A curvature of zero leaves x where it is, an eigenvalue of one that rounding must not turn into growth.
    growing: Tensor = ~finite | (radius > 1 + 1e-12)
    return growing


def spring_map(
    curvature: Tensor,
    lr: float,
    gamma: float,
    evaluations: int,
    momentum: float,
    *,
    pull: float,
    nesterov: bool = False,
) -> Tensor:
    """Return what a round does to (x, y, velocity) of modes of given curvature ``(m,)``, as matrices ``(m, 3, 3)``."""
    start = torch.eye(3, dtype=torch.float64).expand(len(curvature), 3, 3)
    x, y, velocity = start.unbind(1)  # rows: what each is in terms of the three at the start
    for _ in range(evaluations):
        gradient = curvature[:, None] * y + (y - x) / gamma
        velocity = momentum * velocity + gradient
        y = y - lr * (gradient + momentum * velocity if nesterov else velocity)
    return torch.stack([x + pull * (y - x), y, velocity if momentum else torch.zeros_like(y)], 1)


def sgd_limit(lr: float, momentum: float, nesterov: bool = False) -> float:
    """Return the curvature that SGD bears."""
    if lr == 0:
        return math.inf
    return (2 + 2 * momentum) / (1 + 2 * momentum if nesterov else 1) / lr
