"""The eigen-solver of readings, which starts from the solve before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eos_monitor.curvature.audit import NEARLY_INVARIANT, Audit
from eos_monitor.curvature.hessian import HessianOperator
from eos_monitor.curvature.lanczos import Spectrum, lanczos_recycled
from eos_monitor.curvature.norms import length_of
from eos_monitor.limits.edge_scale import shortened
from eos_monitor.limits.thresholds import CriticalCurvature
from eos_monitor.readings.settings import Solver

# A cold start stopped at 1e-3 sat on the second eigenvalue of {1, 0.98, bulk} in 4 of 200 seeded runs (n = 2,000), at
# 3e-4 and 1e-4 in none; the tighter stop costs one or two products, once per run.
_COLD_RTOL = 1e-4
# A warm solve is stopped at this share of rtol: where two eigenvalues cross, a mixture of both modes passes a looser
# stop. Along four MLP trajectories through the edge 41 of 1,220 readings stopped at 1e-2 were 1 to 4 % low, at 4e-3
# none (the largest error 0.5 %), for 1.3 products more on average.
_WARM_SHARE = 0.4
# An edge ratio below this is nothing: λ_max ≈ 0 has no relative accuracy to reach.
_ATOL = 1e-6
# A critical curvature below this share of the median counts as this share.
_DEAD = 1e-12
# A converged block has residual 0 however large an eigenvalue that it does not contain. What a solve's residuals
# brought into the basis has a part of everything where all coordinates feel one another, and of nothing else where
# they do not: so a warm solve is audited that ends within the span of its start, far below its tolerance, or in a
# space that its products hardly leave; or whose top mode is another than before (what took its place may not be the
# largest); or that sits at the floor of decay; and every tenth. Over 5,000 warm readings of spectra that grow, leap,
# cross, collapse, turn within a plane or have a low rank none is off by over 1 %; without an audit two in five were.
# Where an audit has found something the next ten solves are audited: so do residuals that do not feel everything give
# themselves away. (On the MLPs and CNNs none ever did; without it 3 of 600 readings of crossings were off.) One product
# along a random column at every reading found next to nothing, and an audit wherever the top fell by 5 % cost a CNN at
# its edge 7.5 products a reading in place of 5.5.
AUDIT_EVERY = 10  # solves
_CLOSED = 0.15  # of the tolerance; along MLPs and CNNs at their edge 11 of 198 residuals were below
_KEPT = 0.5  # part of a mode within those before
_LEAST_AUDIT = 3
_MOST_AUDIT = 17
# Share of rtol that may be left open: the bound is of a typical part in the audit's vector, and two in three have less.
_OPEN = 0.75
# Where decay has most of an eigenvalue, the residual is held to the Hessian's part of it, down to this share.
_CANCELLATION = 1e-5
# From this edge ratio on a mode counts as one of those at the edge.
_NEAR_EDGE = 0.75
_MOST_MODES = 16


class EdgeOperator:
    """C^-½ (±H + W) C^-½ on the coordinates that have a threshold; the others are zero.

    Args:
        hessian: Products with H.
        curvature: C and W, and the sign of H.
        reachable: What :meth:`reachable` returns; nothing stops a solve by default.

    Attributes:
        scale: C^-½, ``(n,)`` or ``(1,)``; 0 where there is no threshold.
        mask: Where there is one; None for everywhere.
        dimension: Number of those coordinates.
        floor: Largest eigenvalue of the decay alone, C^-½ W C^-½.
        shift: The floor where W and C are multiples of the identity, so that it is in every eigenvalue; else 0.
    """

    def __init__(
        self,
        hessian: HessianOperator,
        curvature: CriticalCurvature,
        reachable: Callable[[EdgeOperator], float] | None = None,
    ) -> None:
        assert curvature.c is not None
        self.size = hessian.size
        self.dtype = hessian.dtype
        self.device = hessian.device
        self.hessian = hessian
        self._reachable = reachable
        self._sign = curvature.sign
        c = shortened(curvature.c.to(hessian.device))
        l2 = shortened(curvature.l2.to(hessian.device, hessian.dtype))
        least, most = (float(bound) for bound in torch.aminmax(c))
        self.mask = None if math.isfinite(most) else torch.isfinite(curvature.c.to(hessian.device))  # None: all
        if least < _DEAD * most:
            # Dead units leave Adam's c near zero; so does the curvature there, and the floor keeps 0/0 out.
            c = c.clamp(min=_DEAD * float(c[torch.isfinite(c)].median()))
        self.scale = c.rsqrt().to(hessian.dtype)  # (n,) or (1,); 0 where c is infinite
        self._l2 = l2 if bool(l2.any()) else None
        self.dimension = self.size if self.mask is None else int(self.mask.sum())
        self.floor = float((l2 * self.scale.square()).max())
        self.shift = self.floor if len(c) == len(l2) == 1 else 0.0

    def matvec(self, u: Tensor) -> Tensor:
        """Return the product with ``u``, ``(n,)``."""
        return self._product(u, self.hessian.matvec)

    def exact_product(self, u: Tensor) -> Tensor:
        """Return the product with ``u``, ``(n,)``, in double precision throughout."""
        return self._product(u.double(), self.hessian.matvec_in_double)

    def reachable(self) -> float:
        """Return the residual, relative to an eigenvalue, below which rounding lets no solve get."""
        return 0.0 if self._reachable is None else self._reachable(self)

    def _product(self, u: Tensor, matvec: Callable[[Tensor], Tensor]) -> Tensor:
        v = self.scale * u
        product = matvec(v)
        if self._sign < 0:
            product = -product
        if self._l2 is not None:
            product = product + self._l2 * v
        return self.scale * product


class StartVectors:
    """A seeded generator that is made on first use: one that exists does not survive the way to a spawned process."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @cached_property
    def generator(self) -> torch.Generator:
        """Generator of the start vectors."""
        return torch.Generator().manual_seed(self._seed)

    def vector(self, like: HessianOperator | EdgeOperator) -> Tensor:
        """Return a Gaussian vector that ``like`` can be applied to."""
        return torch.randn(like.size, generator=self.generator, device="cpu").to(like.device, like.dtype)


@dataclass(frozen=True)
class Solution:
    """The top eigenpairs of an edge operator.

    Attributes:
        operator: The edge operator.
        spectrum: Its eigenvalues, and their vectors u in the scaled coordinates C^½ θ.
        open: By how much an eigenvalue that was not found may exceed the last one.
    """

    operator: EdgeOperator
    spectrum: Spectrum
    open: float = 0.0

    @property
    def top(self) -> float:
        """The largest eigenvalue."""
        return float(self.spectrum.eigenvalues[0])

    @property
    def mode(self) -> Tensor:
        """Its mode x = C^-½ u in parameter space, ``(n,)``."""
        return self.operator.scale * self.spectrum.eigenvectors[:, 0]

    @property
    def modes(self) -> Tensor:
        """All modes in parameter space, ``(n, k)``."""
        return self.operator.scale[:, None] * self.spectrum.eigenvectors


class WarmSolver:
    """Eigen-solver that starts from the Ritz vectors of the solve before.

    Args:
        k: Number of eigenvalues; None for what the settings ask for.
        settings: How to solve.
        random: Start vectors.
        block: Ritz vectors to begin with, ``(n, j)``.
        late: Whether the time for products is up.

    Attributes:
        matvecs: Products in all solves.
        solves: Number of solves.
    """

    def __init__(
        self,
        k: int | None,
        settings: Solver,
        random: StartVectors,
        block: Tensor | None = None,
        late: Callable[[], bool] | None = None,
    ) -> None:
        self.block = block
        self.matvecs = 0
        self.solves = 0
        self._scout: Tensor | None = None
        self._wary = 0  # warm solves to audit, because an audit has found something
        self._k = k or (1 if settings.k == "edge" else settings.k)
        self._settings = settings
        self._random = random
        self._late = late

    def asked(self, operator: EdgeOperator) -> Solution:
        """Return the eigenpairs that the settings ask for."""
        return self.solve_near_edge(operator) if self._settings.k == "edge" else self.solve(operator)

    def solve(self, operator: EdgeOperator) -> Solution:
        """Return the top eigenpairs."""
        block = self.block
        mask = operator.mask
        rtol = self._settings.rtol
        warm = block is not None and block.shape[0] == operator.size
        start = self._random.vector(operator) if block is None or not warm else block.to(operator.device)
        start = start.reshape(operator.size, -1)
        tight = min(rtol, _COLD_RTOL)
        step = operator.hessian.step
        # No residual gets below the error of the products; beyond `rtol` that is no excuse.
        tolerance = max(_WARM_SHARE * rtol if warm else tight, min(2 * step.error, rtol) if step else 0.0)
        found = lanczos_recycled(
            operator,
            start if mask is None else start * mask[:, None],
            k=min(self._k, operator.dimension),
            rtol=tolerance,
            atol=max(_ATOL, _CANCELLATION * abs(operator.shift)),
            shift=operator.shift,
            reachable=operator.reachable,
            late=self._late,
            max_matvecs=self._settings.max_matvecs,
            generator=self._random.generator,
            audit=lambda spectrum, inside, leak: self._audit(operator, spectrum, inside, leak, start if warm else None),
        )
        self.block = found.block
        self._scout = found.scout
        if warm:
            rose = found.raised > rtol * abs(float(found.spectrum.eigenvalues[0]))
            self._wary = AUDIT_EVERY if rose else max(0, self._wary - 1)
        self.solves += 1
        self.matvecs += found.spectrum.matvecs
        spectrum = found.spectrum
        # What rounding, or what was never seen, leaves open must not matter.
        missed = found.open > max(_OPEN * rtol * abs(float(spectrum.eigenvalues[-1])), _ATOL)
        if missed or operator.reachable() > rtol:
            spectrum = replace(spectrum, converged=False)
        return Solution(operator, spectrum, found.open)

    def _audit(
        self, operator: EdgeOperator, spectrum: Spectrum, inside: bool, leak: float, before: Tensor | None
    ) -> Audit | None:
        """Return how to look beyond a solve that has converged, in the span of its start or not; None for not at all.

        A cold start is a vector that has a part of everything, so that only its first products are suspicious.
        """
        theta = float(spectrum.eigenvalues[0])
        rtol = self._settings.rtol
        due = inside or theta <= operator.floor + max(rtol * abs(theta), _ATOL)
        if before is not None:
            size = abs(theta - operator.shift)
            closed = (
                float(spectrum.residuals[0]) <= _CLOSED * _WARM_SHARE * rtol * size or leak <= NEARLY_INVARIANT * size
            )
            vectors = spectrum.eigenvectors
            kept = (before[:, : vectors.shape[1]].T @ vectors).norm(dim=0)
            due = (
                due
                or closed
                or float(kept.min()) < _KEPT
                or self._wary > 0
                or self.solves % AUDIT_EVERY == AUDIT_EVERY - 1
            )
        if not due:
            return None
        start = self._random.vector(operator)
        share = 1.0 / operator.dimension
        if self._scout is not None and self._scout.shape == start.shape:
            # What the last audit had found beneath the top goes on growing in it.
            start = start / length_of(start) + self._scout.to(start)
            share /= 2
        if operator.mask is not None:
            start = start * operator.mask
        return Audit(start, share, _LEAST_AUDIT, _MOST_AUDIT, rtol / 2, _ATOL)

    def solve_near_edge(self, operator: EdgeOperator) -> Solution:
        """Return all eigenpairs of at least 0.75, 1 to 16 of them, with the products of all solves that it took."""
        solution = self.solve(operator)
        spectrum = solution.spectrum
        matvecs = spectrum.matvecs
        while float(spectrum.eigenvalues[-1]) >= _NEAR_EDGE and len(spectrum.eigenvalues) == self._k < _MOST_MODES:
            self._k = min(_MOST_MODES, self._k + 2)
            solution = self.solve(operator)
            spectrum = solution.spectrum
            matvecs += spectrum.matvecs
        near = max(1, int((spectrum.eigenvalues >= _NEAR_EDGE).sum()))
        self._k = min(_MOST_MODES, near + 1)  # the next solve sees that it has all of them
        found = replace(
            spectrum,
            eigenvalues=spectrum.eigenvalues[:near],
            eigenvectors=spectrum.eigenvectors[:, :near],
            residuals=spectrum.residuals[:near],
            matvecs=matvecs,
        )
        return replace(solution, spectrum=found)
