"""An orthonormal basis that grows by the products of a symmetric operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eos_monitor.curvature.norms import combinations, length_of

_LITTLE_REMOVED = 0.7  # of the length left after one orthogonalization: what is left is orthogonal to rounding


def dimension_of(operator: Any, size: int | None) -> int:
    """Return the dimension that is given, or else that of the operator.

    Raises:
        ValueError: If there is neither.
    """
    n: int | None = size if size is not None else getattr(operator, "size", None)
    if n is None:
        raise ValueError("Expected `size` for a plain function, got None. Pass size=n.")
    return n


class Basis:
    """Orthonormal rows V with their products W = V A by a symmetric operator A, and T = V Wᵀ.

    Args:
        operator: Object with ``matvec`` (and ``dtype``, ``device``), or a function ``v -> A v``.
        n: Dimension of the vectors.
        capacity: Most rows.
        dtype: Floating-point type of the vectors; by default the operator's, float32 for a function.
        device: Device of the vectors; by default the operator's, the CPU for a function.
        generator: Source of random vectors; seed 0 when None.

    Attributes:
        n: Dimension of the vectors.
        capacity: Most rows.
        count: Rows that there are.
        dtype: Floating-point type of the vectors.
        device: Device of the vectors.
    """

    def __init__(
        self,
        operator: Any,
        n: int,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        dtype = dtype if dtype is not None else getattr(operator, "dtype", torch.float32)
        device = torch.device(device if device is not None else getattr(operator, "device", "cpu"))
        self.n = n
        self.capacity = capacity
        self.count = 0
        self.dtype = dtype
        self.device = device
        self._matvec: Callable[[Tensor], Tensor] = getattr(operator, "matvec", operator)
        self._generator = generator or torch.Generator().manual_seed(0)
        self._v = torch.empty(capacity, n, dtype=dtype, device=device)
        self._w = torch.empty(capacity, n, dtype=dtype, device=device)
        self._t = torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu")

    def random_vector(self) -> Tensor:
        """Return a vector of normal numbers."""
        # Drawn where the generator lives, so that a seed means the same vector on every device.
        draw = torch.randn(self.n, generator=self._generator, dtype=self.dtype, device=self._generator.device)
        return draw.to(self.device)

    def add(self, vector: Tensor) -> bool:
        """Append the direction of ``vector`` and its product; False if it depends on the basis."""
        m = self.count
        norm = length_of(vector)
        if not norm > 0.0:
            return False
        q = torch.div(vector, norm, out=self._v[m])  # in its place: fresh memory costs more than arithmetic on it
        # Twice is enough (Giraud et al. 2005), and once if little was removed; a vector that keeps shrinking is in the
        # span.
        for _ in range(2):
            q.addmv_(self._v[:m].T, self._v[:m] @ q, alpha=-1)
            length = length_of(q)
            if not length > 100 * torch.finfo(self.dtype).eps:
                return False
            q /= length
            if length > _LITTLE_REMOVED:
                break
        w = self._matvec(q)
        if not math.isfinite(float(w.sum())):  # one pass; torch.isfinite takes several
            raise RuntimeError(
                "Expected finite matrix-vector products, got NaN or infinity. The loss or its derivatives overflow "
                "at the present parameters."
            )
        self._w[m] = w
        # T is symmetric up to rounding; the mean of both triangles keeps the better half of the digits.
        row = (self._w[: m + 1] @ q).double().cpu()
        column = (self._v[: m + 1] @ w).double().cpu()
        self._t[m, : m + 1] = self._t[: m + 1, m] = (row + column) / 2
        self.count = m + 1
        return True

    def clear(self) -> None:
        """Take all rows out."""
        self.count = 0

    def last_product(self) -> Tensor:
        """Return the product of the last row."""
        return self._w[self.count - 1]

    def remainder(self) -> tuple[Tensor, float]:
        """Return the last product without its part in the basis, and its length."""
        rows = self._v[: self.count]
        rest = self._w[self.count - 1].clone()
        for _ in range(2):
            rest.addmv_(rows.T, rows @ rest, alpha=-1)
        return rest, length_of(rest)

    def leak(self) -> float:
        """Return ‖A V − V Vᵀ A V‖: 0 where the span is invariant, so that it leads to nothing outside."""
        rows = self._w[: self.count]
        t = self._t[: self.count, : self.count]
        # A difference of squares: good to the square root of rounding, 3e-4 of ‖A‖ in float32.
        squared = (rows @ rows.T).double().cpu() - t @ t
        return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(squared)[-1])))

    def recurrence(self, first: int) -> tuple[list[float], list[float]]:
        """Return the diagonal of T from row ``first`` on, and what stands beside it."""
        part = self._t[first : self.count, first : self.count]
        return part.diagonal().tolist(), part.diagonal(1).abs().tolist()

    def rayleigh_ritz(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values θ, largest first, and their vectors' coefficients s on the rows, one a column."""
        theta, s = torch.linalg.eigh(self._t[: self.count, : self.count])
        return theta.flip(0), s.flip(1)

    def ritz_vectors(self, s: Tensor, top: int) -> Tensor:
        """Return the first ``top`` Ritz vectors, one a row."""
        return combinations(s[:, :top].T, self._v[: self.count])

    def residuals(self, theta: Tensor, s: Tensor, top: int) -> Tensor:
        """Return ``A v − θ v`` of the first ``top`` Ritz vectors, one a row."""
        coefficients = s[:, :top].T
        rest = combinations(coefficients, self._w[: self.count])
        return rest.sub_(combinations(theta[:top, None] * coefficients, self._v[: self.count]))

    def restart(self, s: Tensor, keep: int) -> None:
        """Put the first ``keep`` Ritz vectors in the place of all rows."""
        coefficients = s[:, :keep].T
        self._v[:keep] = combinations(coefficients, self._v[: self.count])
        self._w[:keep] = combinations(coefficients, self._w[: self.count])
        for i in range(keep):
            row = self._w[:keep].mv(self._v[i]).double().cpu()
            column = self._v[:keep].mv(self._w[i]).double().cpu()
            self._t[i, :keep] = (row + column) / 2
        self.count = keep
