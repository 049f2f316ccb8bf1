"""Lengths and inner products of long vectors, in double precision.

In slices, because the double-precision copy of a long vector costs more than the arithmetic on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SLICE = 1 << 18


def length_of(vector: Tensor) -> float:
    """Return ‖v‖₂."""
    return math.hypot(*(float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in torch.split(vector, _SLICE)))


def dot(a: Tensor, b: Tensor) -> float:
    """Return aᵀb."""
    pairs = zip(torch.split(a, _SLICE), torch.split(b, _SLICE), strict=True)
    return sum(float(x.double() @ y.double()) for x, y in pairs)


def quadratic_form(c: Tensor, x: Tensor) -> float:
    """Return xᵀ diag(c) x, with one entry of ``c`` for all coordinates or one for each.

    Coordinates whose c is infinite are left out: their x is 0.
    """
    total = 0.0
    for start in range(0, len(x), _SLICE):
        weights = x[start : start + _SLICE].double().square()
        terms = weights * (c if len(c) == 1 else c[start : start + _SLICE].double())
        total += float(torch.where(weights > 0.0, terms, 0.0).sum())
    return total


def combinations(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Return ``coefficients @ rows``, ``(k, n)``, in the full precision of the rows.

    One matrix-vector product a row: matrix-matrix products of float32 are rounded to TF32 on accelerators where the
    run's flags allow it, and no residual gets below that.
    """
    return torch.stack([rows.T.mv(row) for row in coefficients.to(rows)])
