"""What is known of one layer: its curvature and the learning rate that it bears."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from eos_monitor.cfl.layer_limits import LayerLimit
from eos_monitor.cfl.paper_bound import PaperBound
from eos_monitor.cfl.partition import ACTIVATED, NOT_ACTIVATED, TRANSITIONING
from eos_monitor.curvature.lanczos import Spectrum


@dataclass(frozen=True)
class CFLEstimate:
    """One layer's curvature and its stability limit.

    Attributes:
        layer: Path of the module that owns the weight.
        activated: Share of the (sample × position) entries of the layer's output that are activated.
        transitioning: Share that is in the bend of the activation. Descriptive: it goes with curvature only moderately.
        not_activated: The rest. All three are 0 where no single activation follows the layer.
        curvature: λ_max of the layer's own block of the Hessian, in the optimizer's coordinates where those differ
            (λ_max(P^-½ (H + W) P^-½) with Adam's P); nan if not known.
        method: ``"cheap"`` (T + GN, without the curvature behind the next layers), ``"exact"`` (the block itself) or
            ``"none"``.
        lr_max: Learning rate at which this layer alone would be at its limit; infinite if none is too high, None if
            the optimizer has no known limit.
        cfl_number: lr / lr_max; 1 is the limit. None without an optimizer, or where it has no limit.
        transition_share: Part of T, the activations' own curvature, in the cheap tier's curvature, 0–1; nan if there
            was no cheap tier.
        form: ``"exact-form"``, ``"approximate"``, ``"weak"`` (how far the cheap tier can be trusted here) or
            ``"not attributed"``.
        reason: Why, in words.
        residual: Relative residual of the eigenpair; of the exact block, or of T + GN.
        products: Products that were spent.
        top_mode_share: Share of the given mode that lies in this weight, 0–1; None if no mode was given.
        paper_bound: The papers' bound, not predictive; None if not asked for, or without an activation.
    """

    layer: str
    activated: float
    transitioning: float
    not_activated: float
    curvature: float
    method: str
    lr_max: float | None
    cfl_number: float | None
    transition_share: float
    form: str
    reason: str
    residual: float
    products: int
    top_mode_share: float | None = None
    paper_bound: PaperBound | None = None

    @property
    def rank_value(self) -> float:
        """What estimates are sorted by: the CFL number, else the curvature; −inf if neither is known."""
        value = self.curvature if self.cfl_number is None else self.cfl_number
        return -math.inf if math.isnan(value) else value

    @classmethod
    def unknown(cls, layer: str, reason: str) -> CFLEstimate:
        """Return what there is to say of a layer without a curvature."""
        nan = math.nan
        return cls(layer, 0.0, 0.0, 0.0, nan, "none", None, None, nan, "not attributed", reason, nan, 0)

    @classmethod
    def solved(cls, layer: str, r: float, spectrum: Spectrum, limit: LayerLimit | None, method: str) -> CFLEstimate:
        """Return the estimate that follows from the top eigenvalue r of C^-½ (H + W) C^-½, or of H without a limit."""
        lr_max = None if limit is None else limit.lr_max(r)
        return replace(
            cls.unknown(layer, ""),
            curvature=r if limit is None else limit.curvature(r),
            method=method,
            lr_max=lr_max,
            cfl_number=limit.lr / lr_max if limit is not None and limit.lr is not None and lr_max else None,
            residual=float(spectrum.residuals[0]) / abs(r) if r else 0.0,
            products=spectrum.matvecs,
        )

    def with_regimes(self, counts: Tensor | None) -> CFLEstimate:
        """Return it with the regimes' shares; ``counts`` are those that are not activated, transitioning, activated."""
        if counts is None or int(counts.sum()) == 0:
            return self
        shares = (counts.double() / counts.sum()).tolist()
        return replace(
            self,
            activated=shares[ACTIVATED],
            transitioning=shares[TRANSITIONING],
            not_activated=shares[NOT_ACTIVATED],
        )
