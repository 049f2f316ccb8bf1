"""Largest algebraic eigenvalues of a symmetric operator that is only known by its products.

The basis may start from a whole block of vectors (the Ritz vectors of an earlier, nearby operator), so the
three-term recurrence does not hold and the products are kept beside the basis: residuals are then exact, restarts cost
no product, and the basis stays small enough (20 vectors) that complete reorthogonalization is cheap beside a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eos_monitor.curvature.audit import Audit, look_beyond
from eos_monitor.curvature.basis import Basis, dimension_of
from eos_monitor.curvature.norms import length_of

_MAX_BASIS = 20
# Products of a solve whose time is up: fewer would end where the next one begins.
_LEAST_PRODUCTS = 3


@dataclass(frozen=True)
class Spectrum:
    """Top of a spectrum, each eigenpair with its residual.

    Attributes:
        eigenvalues: Ritz values, largest first.
        eigenvectors: Orthonormal Ritz vectors, one a column.
        residuals: ``‖A v − θ v‖``, absolute. Some eigenvalue lies within this distance of θ; that it is the largest
            one is not certified.
        matvecs: Products that were spent.
        converged: Whether every residual met its tolerance.
    """

    eigenvalues: Tensor  # (k,) float64, CPU
    eigenvectors: Tensor  # (n, k)
    residuals: Tensor  # (k,) float64, CPU
    matvecs: int
    converged: bool


@dataclass(frozen=True)
class _Stop:
    """When to stop.

    A pair has converged at a residual relative to ``|θ − shift|``, at an absolute one, or at that which rounding lets
    it reach, relative to |θ|. And the time for products may be up.
    """

    rtol: float
    atol: float
    shift: float = 0.0
    reachable: Callable[[], float] | None = None
    late: Callable[[], bool] | None = None

    def tolerances(self, theta: Tensor) -> Tensor:
        tolerances = torch.clamp(self.rtol * (theta - self.shift).abs(), min=self.atol)
        return tolerances if self.reachable is None else torch.maximum(tolerances, self.reachable() * theta.abs())

    def is_up(self) -> bool:
        return self.late is not None and self.late()

    def is_late(self, matvecs: int) -> bool:
        return matvecs >= _LEAST_PRODUCTS and self.is_up()


def lanczos(
    operator: Any,
    *,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    k: int = 1,
    v0: Tensor | None = None,
    rtol: float = 1e-4,
    atol: float = 0.0,
    max_matvecs: int = 64,
    generator: torch.Generator | None = None,
) -> Spectrum:
    r"""Compute the ``k`` largest algebraic eigenvalues of a symmetric operator.

    Rayleigh–Ritz on a basis that starts from ``v0`` and grows by the residual of the first eigenpair that has not
    converged; from a single start vector this spans the Krylov space of Lanczos. At 20 basis vectors the upper half
    of the Ritz vectors is kept (thick restart). Iteration stops when every residual satisfies

    .. math:: \|A v_i - \theta_i v_i\| \le \max(\mathrm{rtol}\,|\theta_i|, \mathrm{atol}),

    or when the products are spent. The eigenvalue error is about residual² / gap; a start vector that is nearly
    orthogonal to the top eigenvector can still converge to a lower one, the more easily the looser ``rtol``. From a
    single start vector an eigenvalue that repeats exactly is found once; a start block of j vectors finds j copies.

    Args:
        operator: Object with ``matvec`` (and ``size``, ``dtype``, ``device``), or a function ``v -> A v`` on flat
            tensors ``(n,)``.
        size: Dimension n; taken from ``operator`` when it has one.
        dtype: Floating-point type of the vectors; default float32 for a function.
        device: Device of the vectors; default CPU for a function.
        k: How many eigenpairs, 1 ≤ k ≤ n.
        v0: Start vector ``(n,)`` or block ``(n, j)``; random normal when None.
        rtol: Relative residual at which an eigenpair counts as converged, ≥ 0. At 1e-2 one call in eight sat on the
            second of two eigenvalues 3 % apart.
        atol: Absolute residual that is accepted whatever θ is; for eigenvalues near 0.
        max_matvecs: Bound on the number of products, ≥ k.
        generator: Source of the random start (and of replacements for dependent vectors); seed 0 when None.

    Returns:
        The top of the spectrum. Not converging is no error: ``converged`` is False.

    Raises:
        ValueError: If an argument is out of range or has the wrong shape.
        RuntimeError: If a product is not finite.

    Example:
        >>> import torch
        >>> diagonal = torch.tensor([-9.0, 0.5, 2.0], dtype=torch.float64)
        >>> spectrum = lanczos(lambda v: diagonal * v, size=3, dtype=torch.float64)
        >>> round(spectrum.eigenvalues.item(), 6), spectrum.converged
        (2.0, True)

    References:
        K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix
        Anal. Appl. 22 (2000).
    """
    n = dimension_of(operator, size)
    _check_arguments(n, k, rtol, atol, max_matvecs)
    basis = Basis(operator, n, _capacity(n, k), dtype=dtype, device=device, generator=generator)
    return _iterate(basis, v0, k, _Stop(rtol, atol), max_matvecs)[0]


@dataclass(frozen=True)
class Recycled:
    """A solve with what the next one starts from.

    Attributes:
        spectrum: Top of the spectrum.
        block: Leading Ritz vectors, ``(n, j)``.
        scout: The Ritz vector that comes after them, ``(n,)``; None if there is none.
        open: By how much an eigenvalue that was not found may exceed the last one of ``spectrum``.
        raised: By how much an audit raised the largest eigenvalue.
    """

    spectrum: Spectrum
    block: Tensor
    scout: Tensor | None
    open: float
    raised: float = 0.0


def lanczos_recycled(
    operator: Any,
    block: Tensor | None,
    *,
    k: int,
    rtol: float,
    atol: float,
    max_matvecs: int,
    generator: torch.Generator,
    budget: int | None = None,
    shift: float = 0.0,
    reachable: Callable[[], float] | None = None,
    late: Callable[[], bool] | None = None,
    audit: Callable[[Spectrum, bool, float], Audit | None] | None = None,
    share: float = 0.85,
    width: int = 4,
) -> Recycled:
    """Solve as :func:`lanczos` does and also return the block ``(n, j)`` to start from at a nearby operator.

    Residuals are relative to ``|θ − shift|``. ``reachable``, asked once there are products, gives the residual relative
    to |θ| below which rounding lets no solve get; ``late``, asked after each product from the third on, whether the
    time is up: what has not converged or not been audited by then is not converged. Without an audit at most
    ``budget`` products are spent. ``audit`` is asked once the solve has converged, with the spectrum, whether it is
    within the span of ``block``, and how far its own span is from invariant; that is done, and the solve goes on
    where that brings a larger eigenvalue to light. The block returned holds the leading Ritz vectors with
    ``θᵢ ≥ share · θ₁``: at least k of them and at most ``max(width, k)``. At the edge of stability several
    eigenvalues crowd at the top, and a single recycled vector follows the wrong one.
    """
    basis = Basis(operator, operator.size, _capacity(operator.size, k), generator=generator)
    stop = _Stop(rtol, atol, shift, reachable, late)
    spectrum, theta, s = _iterate(basis, block, k, stop, max_matvecs if budget is None else budget)
    before = float(theta[0])
    wanted = None
    if audit is not None and spectrum.converged and basis.count < basis.n:
        columns = 0 if block is None else block.shape[1]
        wanted = audit(spectrum, spectrum.matvecs <= columns, basis.leak())
    bound = -math.inf
    if wanted is not None:
        spent = spectrum.matvecs + _settle(basis, wanted, k, columns, stop, max_matvecs - spectrum.matvecs)
        _, s = basis.rayleigh_ritz()
        room = 0 if stop.is_late(spent) else min(wanted.most, max_matvecs - spent)
        audited = False
        if basis.capacity - basis.count < room:
            basis.restart(s, keep=min(basis.count, max(k, basis.capacity - room)))
        if room > 0:
            bound, added = look_beyond(basis, replace(wanted, most=room), k, late)
            spent += added
            audited = bound == -math.inf or added >= wanted.least
        spectrum, theta, s = _go_on(basis, k, stop, max_matvecs, spent)
        if not audited and basis.count < basis.n:
            spectrum = replace(spectrum, converged=False)  # the products or the time were spent before
            bound = -math.inf if math.isinf(bound) else bound  # nothing is known, which `converged` says
    leading = int((theta[: max(width, k)] >= share * theta[0].clamp(min=0.0)).sum())
    kept = max(k, leading)
    if not spectrum.converged:  # what has been built up so far
        kept = max(kept, min(width, len(theta) - 1))
    vectors = basis.ritz_vectors(s, min(kept + 1, s.shape[1]))
    scout = vectors[kept] if len(vectors) > kept else None
    left = max(0.0, bound - float(theta[min(k, len(theta)) - 1]))
    return Recycled(spectrum, vectors[:kept].T, scout, left, float(theta[0]) - before)


def _settle(basis: Basis, audit: Audit, k: int, columns: int, stop: _Stop, most: int) -> int:
    """Add residuals of the pairs from a start block that might yet rise above the k-th; return the products."""
    spent = 0
    while columns > k and spent < min(most, audit.most) and not stop.is_late(basis.count):
        theta, s = basis.rayleigh_ritz()
        count = min(columns, len(theta))
        residual_vectors = basis.residuals(theta, s, count)
        lengths = torch.tensor([length_of(vector) for vector in residual_vectors], dtype=torch.float64, device="cpu")
        excess = (theta[:count] + lengths - audit.enough(theta, k))[k:]
        if not bool((excess > 0.0).any()):
            break
        if basis.count == basis.capacity:
            basis.restart(s, keep=k + (basis.capacity - k) // 2)
        if not basis.add(residual_vectors[k + int(excess.argmax())]):
            break
        spent += 1
    return spent


def _capacity(n: int, k: int) -> int:
    return min(n, max(_MAX_BASIS, 2 * k + 4))


def _iterate(
    basis: Basis,
    v0: Tensor | None,
    k: int,
    stop: _Stop,
    max_matvecs: int,
) -> tuple[Spectrum, Tensor, Tensor]:
    matvecs = 0
    for start in _start_vectors(v0, basis):
        # Where the time is short, one column of the block, and then two that are new.
        if matvecs < max_matvecs and not (matvecs > 0 and stop.is_up()) and basis.add(start):
            matvecs += 1
    return _go_on(basis, k, stop, max_matvecs, matvecs)


def _go_on(basis: Basis, k: int, stop: _Stop, max_matvecs: int, matvecs: int) -> tuple[Spectrum, Tensor, Tensor]:
    """Add residuals to a basis until it has converged."""
    while True:
        theta, s = basis.rayleigh_ritz()
        top = min(k, len(theta))
        residual_vectors = basis.residuals(theta, s, top)  # (top, n)
        residuals = torch.tensor([length_of(vector) for vector in residual_vectors], dtype=torch.float64, device="cpu")
        open_pairs = residuals > stop.tolerances(theta[:top])
        # With n basis vectors the residuals are rounding.
        converged = basis.count == basis.n or (top == k and not bool(open_pairs.any()))
        if converged or matvecs >= max_matvecs or stop.is_late(matvecs):
            return Spectrum(theta[:top], basis.ritz_vectors(s, top).T, residuals, matvecs, converged), theta, s
        direction = residual_vectors[int(open_pairs.int().argmax())]
        if basis.count == basis.capacity:
            basis.restart(s, keep=k + (basis.capacity - k) // 2)
        while not basis.add(direction):
            # In the span already (an invariant subspace, or rounding): go on from a random vector.
            direction = basis.random_vector()
        matvecs += 1


def _start_vectors(v0: Tensor | None, basis: Basis) -> list[Tensor]:
    if v0 is None:
        return [basis.random_vector()]
    n = basis.n
    block = v0.reshape(n, -1) if v0.ndim in (1, 2) and v0.shape[0] == n else None
    if block is None or block.shape[1] == 0:
        raise ValueError(f"Expected `v0` of shape ({n},) or ({n}, j), got {tuple(v0.shape)}.")
    columns = [(column, length_of(column)) for column in block.to(basis.device, basis.dtype).T]
    usable = [(column, norm) for column, norm in columns if math.isfinite(norm)]
    if not any(norm > 0.0 for _, norm in usable):
        return [basis.random_vector()]
    return [column for column, _ in usable[: max(1, basis.capacity - 1)]]


def _check_arguments(n: int, k: int, rtol: float, atol: float, max_matvecs: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"Expected 1 <= `k` <= size = {n}, got {k}.")
    if not (rtol >= 0.0 and atol >= 0.0):
        raise ValueError(f"Expected `rtol` >= 0 and `atol` >= 0, got {rtol} and {atol}.")
    if max_matvecs < k:
        raise ValueError(f"Expected `max_matvecs` >= k = {k}, got {max_matvecs}.")
