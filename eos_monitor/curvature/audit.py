"""What a solve that has converged may have missed: a few products along a vector that has a part of everything.

A block of converged vectors has residual 0 however large an eigenvalue that it does not contain. Lanczos' recurrence
from a random vector z, orthogonal to that block, bounds what there may be: with the orthonormal polynomials pᵢ of z's
spectral measure an eigenvector v of eigenvalue λ has (vᵀz)² Σ pᵢ(λ)² ≤ 1, because the recurrence's vectors are
orthonormal and the i-th has the component pᵢ(λ) vᵀz along v. The sum grows beyond the largest Ritz value, so that
the λ at which it reaches 1 / (vᵀz)² bounds all eigenvalues of which z has that much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eos_monitor.curvature.basis import Basis

# A span that its products leave by no more than this share of the top eigenvalue has met little of the spectrum. At
# 462 readings of MLPs and CNNs at their edge that was so 11 times.
NEARLY_INVARIANT = 0.05
# |vᵀz| √n is normal: below this once in a thousand.
_LITTLE = 1e-3
_HALVINGS = 60


@dataclass(frozen=True)
class Audit:
    """How to look beyond a solve.

    Attributes:
        start: Vector z with a random part, ``(n,)``.
        share: Typical (vᵀz)² / ‖z‖² of an eigenvector v.
        least: Products that are spent in any case.
        most: Most products.
        rtol: Excess over the solve's eigenvalue that does not matter, relative to the largest one.
        atol: The same, absolute.
    """

    start: Tensor
    share: float
    least: int
    most: int
    rtol: float
    atol: float

    def enough(self, theta: Tensor, k: int) -> float:
        """Return the bound below which nothing matters, from the Ritz values, largest first."""
        return float(theta[min(k, len(theta)) - 1]) + max(self.rtol * float(theta[0].abs()), self.atol)


def look_beyond(basis: Basis, audit: Audit, k: int, late: Callable[[], bool] | None = None) -> tuple[float, int]:
    """Add the Krylov space of the audit's vector to a basis that holds k converged pairs, until the time is up.

    Returns:
        The largest eigenvalue that there may be, if z has its typical share of it; −∞ if there is no other. And the
        products.
    """
    first = basis.count
    direction = audit.start
    bound = math.inf
    spent = 0
    while basis.count < basis.capacity and spent < audit.most and not (late is not None and late()):
        if not basis.add(direction):
            return -math.inf, spent
        spent += 1
        direction, length = basis.remainder()
        diagonal, beside = basis.recurrence(first)
        beside.append(length)
        enough = audit.enough(basis.rayleigh_ritz()[0], k)
        bound = largest_possible(diagonal, beside, audit.share)
        safe = largest_possible(diagonal, beside, _LITTLE**2 * audit.share)
        if safe == -math.inf or (spent >= audit.least and safe <= enough):
            break
    return bound, spent


def largest_possible(diagonal: list[float], beside: list[float], share: float) -> float:
    """Return the largest eigenvalue whose vector may have the component ``√share`` along the start of a recurrence.

    Args:
        diagonal: Diagonal of the tridiagonal matrix, α₁ … αₘ.
        beside: What stands beside it, β₁ … βₘ, the last that of the vector to come.
        share: Squared component, in (0, 1).
    """
    if not all(b > 0.0 for b in beside):  # the space is invariant, and holds all that the start has a part of
        return -math.inf
    m = len(diagonal)
    # On the CPU, wherever the user lets tensors be made by default.
    off = torch.tensor(beside[: m - 1], dtype=torch.float64, device="cpu")
    t = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    t += torch.diag(off, 1) + torch.diag(off, -1)
    low = float(torch.linalg.eigvalsh(t)[-1])
    # |p₁ … pₘ| ≥ ((λ − θ) / β)ⁱ here, so that even p₁ alone excludes what lies this far out.
    high = low + max(beside) / math.sqrt(share)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if share * _christoffel(diagonal, beside, middle) <= 1.0:
            low = middle
        else:
            high = middle
    return high


def _christoffel(diagonal: list[float], beside: list[float], x: float) -> float:
    """Return Σ pᵢ(x)², i = 0 … m."""
    before = 0.0
    now = 1.0
    total = 1.0
    previous = 0.0
    for a, b in zip(diagonal, beside, strict=True):
        after = ((x - a) * now - previous * before) / b
        before = now
        now = after
        previous = b
        total += min(now * now, 1e200)
        if total > 1e100:
            break
    return total
