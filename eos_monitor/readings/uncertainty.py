"""The error of an edge ratio that comes from its probe being a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eos_monitor.readings.edge_solver import Solution

_PARTS = 8


@dataclass(frozen=True)
class SamplingError:
    """Error of a sample's edge ratio as an estimate of the whole's.

    Attributes:
        relative: RMS error, relative to the edge ratio; None if it is not known.
        note: Why it is not known, where the loss is to blame.
    """

    relative: float | None = None
    note: str | None = None

    def at(self, r: float) -> float | None:
        """Return the error of an edge ratio r; None if it is not known."""
        return None if self.relative is None or r <= 0.0 else self.relative * r


def sampling_error(solution: Solution) -> SamplingError:
    """Return the error of a top eigenvalue θ > 0; not known if the probe has fewer than 8 parts.

    With p_b = A_b u over m parts: the variance of their mean along u, plus the square of the upward bias that comes
    from u fitting the sample, to first order Σ_b ‖p_b − p̄‖²_⊥ / (m (m − 1) θ), the other eigenvalues taken as 0.
    """
    theta = solution.top
    edge = solution.operator
    try:
        spread = edge.hessian.spread(solution.spectrum.eigenvectors[:, 0], edge.scale, _PARTS)
    except Exception as error:  # a loss that needs whole batches still has a curvature
        return SamplingError(note=f"no sampling error, because the loss cannot be taken on slices: {error}")
    if spread is None:
        return SamplingError()
    if not spread.reproduces:
        return SamplingError(
            note=f"no sampling error, because slices of batches have a mean curvature of {spread.mean:.3g} along the "
            f"mode, the whole has {spread.whole:.3g}: the loss is no mean over samples (reduction='sum'?)"
        )
    bias = spread.across / (spread.parts * theta)
    return SamplingError(math.sqrt(max(0.0, spread.along) / spread.parts + bias**2) / theta)
