r"""The real line cut into the regimes of an elementwise activation.

A pre-activation z is *transitioning* where :math:`|r''(z)| \ge \tfrac12 \max |r''|`; elsewhere it is *activated* where
:math:`|r'(z)| \ge \tfrac12 \sup |r'|`, and *not activated* otherwise. Kinks (ReLU) have no such width of their own:
there z is transitioning within a reach that the caller names.

References:
    Sun, Lao, Yezzi, Sundaramoorthi, "A PDE-based Explanation of Extreme Numerical Sensitivities and Edge of
    Stability in Training Neural Networks", arXiv 2206.02001, section 5.4 and table 3, which tells the regimes of Swish
    apart by K*I ≫ 0, ≈ 0 and ≪ 0 without naming a border.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NOT_ACTIVATED = 0
TRANSITIONING = 1
ACTIVATED = 2

Elementwise = Callable[[Tensor], Tensor]

_GRID_END = 20.0  # of the numeric rule; beyond it functions are taken to be in their last regime
_GRID_STEP = 1e-3
_JUMP = 1e-3  # a kink is a jump of r′ by more than this share of sup |r′|


@dataclass(frozen=True)
class Partition:
    """The real line cut into regimes.

    Attributes:
        borders: Ascending borders, in units of 1/scale of the activation.
        regimes: Regime below the first border, …, above the last; at a border that of the interval above it.
        kinks: Where r′ jumps, in units of z.
    """

    borders: tuple[float, ...]
    regimes: tuple[int, ...]
    kinks: tuple[float, ...] = ()


def hill(low: float, high: float) -> Partition:
    """Return the partition of a function with one bend between two borders."""
    return Partition((low, high), (NOT_ACTIVATED, TRANSITIONING, ACTIVATED))


def two_bands(inner: float, outer: float) -> Partition:
    """Return the partition of a function with a bend on either side of a steep core."""
    core = (NOT_ACTIVATED, TRANSITIONING, ACTIVATED, TRANSITIONING, NOT_ACTIVATED)
    return Partition((-outer, -inner, inner, outer), core)


# Solutions of |r″(z)| = ½ max |r″|, at scale 1.
PARTITIONS = {
    "silu": hill(-1.170685945929424, 1.170685945929424),
    "gelu": hill(-0.7936284493960728, 0.7936284493960728),
    "gelu_tanh": hill(-0.7929887111352353, 0.7929887111352353),
    "mish": hill(-1.0624289321051148, 0.7542057161583409),
    "softplus": hill(-2.0 * math.acosh(math.sqrt(2.0)), 2.0 * math.acosh(math.sqrt(2.0))),
    "hardswish": hill(-3.0, 3.0),
    "tanh": two_bands(0.2032655736710794, 1.396312279220164),
    "sigmoid": two_bands(0.40653114734215856, 2.7926245584403127),
}


def derivatives(function: Elementwise, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return r′ and r″ at z by two backward passes through the scalar function."""
    z = z.detach().clone().requires_grad_()
    value = function(z)
    if value.shape != z.shape:
        raise ValueError(f"Expected an elementwise function, got {tuple(value.shape)} from {tuple(z.shape)}.")
    (first,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    if not first.requires_grad:  # linear
        return first, torch.zeros_like(first)
    (second,) = torch.autograd.grad(first.sum(), z, allow_unused=True)
    return first.detach(), torch.zeros_like(first) if second is None else second


def numeric_partition(function: Elementwise) -> Partition:
    """Return the regimes by the rule on a grid of |z| ≤ 20; borders are good to 1e-6 where r″ is smooth."""
    count = round(_GRID_END / _GRID_STEP)
    # Off zero by half a step: 0 is where kinks are, and autograd has to pick a side there.
    z = (torch.arange(-count, count, dtype=torch.float64, device="cpu") + 0.5) * _GRID_STEP
    try:
        with torch.inference_mode(False), torch.enable_grad():
            first, second = derivatives(function, z)
    except RuntimeError as error:
        raise ValueError(f"Expected a function of single numbers, got one that fails on them: {error}") from error
    first = first.abs().nan_to_num()
    bend = second.nan_to_num().abs()
    half = bend.max() / 2
    jumps = first.diff().abs() - _GRID_STEP * torch.maximum(bend[1:], bend[:-1])
    kinks = (z[:-1] + _GRID_STEP / 2)[jumps > _JUMP * first.max()]
    regimes = torch.where(first >= first.max() / 2, ACTIVATED, NOT_ACTIVATED)
    # Where r″ vanishes everywhere, "at least half of its maximum" would hold everywhere.
    if float(half) > 1e-12:
        regimes[bend >= half] = TRANSITIONING
    changes = (regimes.diff() != 0).nonzero().flatten()
    borders = [_crossing(z, bend - half, first - first.max() / 2, int(i), regimes) for i in changes]
    return Partition(
        tuple(borders),
        (int(regimes[0]), *(int(regimes[i + 1]) for i in changes)),
        tuple(round(float(kink), 9) for kink in kinks),
    )


def _crossing(z: Tensor, bend: Tensor, slope: Tensor, i: int, regimes: Tensor) -> float:
    """Find between grid points i and i + 1 where the quantity that changed the regime passes zero."""
    level = bend if TRANSITIONING in (int(regimes[i]), int(regimes[i + 1])) else slope
    below = float(level[i])
    above = float(level[i + 1])
    # A jump (piecewise r″) has no crossing to interpolate: it is in the middle, where grids are laid around 0.
    share = 0.5 if abs(above - below) > 0.1 * float(level.abs().max()) else below / (below - above)
    return float(z[i]) + share * _GRID_STEP
