"""One reading: how far the optimizer in use is from its full-batch edge of stability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from eos_monitor.curvature.norms import quadratic_form
from eos_monitor.limits.edge_scale import edge_scale_along
from eos_monitor.limits.plateau import batch_sharpness_limits
from eos_monitor.limits.thresholds import CriticalCurvature, critical_curvature, learning_rates

_AGREE = 1.01  # quotient of two bounds that are one number


@dataclass(frozen=True, kw_only=True)
class StabilityReading:
    """How far from the full-batch edge of stability one step was. What was not measured is None.

    Attributes:
        step: Optimizer step that the reading precedes.
        loss: Mean loss over the probe.
        lr: Learning rate of each parameter group.
        sharpness: λ_max(H), the largest eigenvalue of the loss Hessian over the probe.
        normalized_sharpness: ``edge_ratio · threshold``; lr·λ_max(H) for gradient descent without decay.
        threshold: Limit of lr·λ_max(P⁻¹(H + W)) for this optimizer: 2 for gradient descent.
        edge_ratio: λ_max(C^-½ (H + W) C^-½); 1 at the full-batch edge.
        error: RMS error of ``edge_ratio`` as an estimate of its value on all data: residual, what an audit of the solve
            leaves open, sampling; numerical only where ``sampling_error`` is None.
        sampling_error: Part of ``error`` that comes from the probe being a sample.
        residual: ``‖A v − θ v‖ / |θ|`` of the top eigenpair.
        eigenvalues: The k largest eigenvalues of C^-½ (H + W) C^-½.
        edge_scale: Factor on all learning rates at which ``edge_ratio`` would be 1; None if it is not positive.
        edge_lr: ``edge_scale`` times each group's learning rate: the full-batch edge, no advice.
        batch_sharpness: Sharpness along minibatch gradients, in units of curvature.
        batch_sharpness_error: Its standard error.
        batch_sharpness_limits: Where it settles under SGD with momentum γ: 2(1 − γ)/η for small batches and 2(1 + γ)/η
            for large ones.
        directional_ratio: uᵀHu / (−2 gᵀu) along the update u: a state gauge, blind before an oscillation has built up.
        edge_ratio_clipped: Edge ratio at the learning rate that gradient clipping leaves; under Lightning, SGD family.
        edge_ratio_next: Edge ratio at the settings that the scheduler will have set for the next step.
        full_batch: Whether the probe is all the data that a step uses.
        samples: Number of samples in the probe.
        matvecs: Hessian-vector products of the solves; self-check and sampling error are not counted.
        seconds: Wall-clock time of the reading.
        method: How the products were computed.
        converged: Whether the residuals met their tolerance; this does not certify that no larger eigenvalue exists.
        stale: Whether the optimizer's settings changed between measurement and step in a way that cannot be followed.
        ready: Whether the optimizer's state was old enough for an edge.
        notes: What a reader should know of this reading, in words.
    """

    step: int
    loss: float | None
    lr: tuple[float, ...]
    sharpness: float | None = None
    normalized_sharpness: float | None = None
    threshold: float | None = None
    edge_ratio: float | None = None
    error: float | None = None
    sampling_error: float | None = None
    residual: float | None = None
    eigenvalues: tuple[float, ...] | None = None
    edge_scale: float | None = None
    edge_lr: tuple[float, ...] | None = None
    batch_sharpness: float | None = None
    batch_sharpness_error: float | None = None
    batch_sharpness_limits: tuple[float, float] | None = None
    directional_ratio: float | None = None
    edge_ratio_clipped: float | None = None
    edge_ratio_next: float | None = None
    full_batch: bool = False
    samples: int = 0
    matvecs: int = 0
    seconds: float = 0.0
    method: str = "double-backward"
    converged: bool = False
    stale: bool = False
    ready: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OwnEdge:
    """The edge of one of several optimizers that have losses of their own.

    Attributes:
        name: What the optimizer is called.
        ratio: Its edge ratio, over its own parameters.
        start: First of its coordinates.
        stop: One past the last.
    """

    name: str
    ratio: float
    start: int
    stop: int


@dataclass(frozen=True)
class Measurement:
    """A reading together with the critical curvature that it was taken at.

    Attributes:
        reading: The reading.
        curvature: Critical curvature that it was taken at.
        mode: Critical mode x in parameter space, xᵀ C x = 1; None without an edge ratio.
        own: The edges of several optimizers that have losses of their own, the nearest first, which is the reading's.
    """

    reading: StabilityReading
    curvature: CriticalCurvature
    mode: Tensor | None = None  # (n,)
    own: tuple[OwnEdge, ...] = ()

    def at(self, optimizers: Sequence[Optimizer]) -> StabilityReading:
        """Return the reading for the optimizers' present settings.

        If the critical curvature is c/s with one s for all coordinates, the edge ratio is s times the measured one,
        exactly, and so it is where each of several optimizers with losses of their own has one s. With several of them
        (rates of groups that moved apart) the edge ratio lies between r / (xᵀ C' x) and the largest s times r: where
        these agree within 1 % it is in their middle, and half their distance is part of the error; otherwise the
        reading is marked stale.
        """
        reading = self.reading
        lr = learning_rates(optimizers)
        if reading.edge_ratio is None or self.mode is None:
            return replace(reading, lr=lr)
        now = critical_curvature(optimizers)
        carried = self._carried(now, self.mode, reading.edge_ratio)
        if carried is None:
            return replace(reading, stale=True)
        s, unsure = carried
        ratio = s * reading.edge_ratio
        threshold = now.threshold_along(self.mode)
        scale = reading.edge_scale
        if s != 1.0 and scale is not None:
            scale = edge_scale_along(s**0.5 * self.mode, ratio, optimizers)
        return replace(
            reading,
            lr=lr,
            batch_sharpness_limits=None if reading.batch_sharpness is None else batch_sharpness_limits(optimizers),
            edge_ratio=ratio,
            # Between bounds the top one only: the others may have the factors of other coordinates.
            eigenvalues=tuple(s * value for value in (reading.eigenvalues or ())[: 1 if unsure else None]),
            error=None if reading.error is None else math.hypot(s * reading.error, unsure * ratio),
            sampling_error=None if reading.sampling_error is None else s * reading.sampling_error,
            threshold=threshold,
            normalized_sharpness=None if threshold is None else ratio * threshold,
            edge_scale=scale,
            edge_lr=None if scale is None else tuple(scale * value for value in lr),
        )

    def _carried(self, now: CriticalCurvature, mode: Tensor, ratio: float) -> tuple[float, float] | None:
        """Return the factor on an edge ratio and its relative error; None if it cannot be told."""
        s = common_factor(self.curvature, now)
        if s is None and self.own:
            s = self._own_factor(now)
        if s is not None:
            return s, 0.0
        if ratio <= 0.0:
            return None
        bounds = factor_bounds(self.curvature, now, mode)
        if bounds is None or bounds[1] > _AGREE * bounds[0]:
            return None
        middle = (bounds[0] + bounds[1]) / 2
        return middle, (bounds[1] - bounds[0]) / (2 * middle)

    def _own_factor(self, now: CriticalCurvature) -> float | None:
        """Return the factor on the ratio of the optimizer that was nearest to its edge, if it still is."""
        factors = [common_factor(self.curvature, now, slice(edge.start, edge.stop)) for edge in self.own]
        known = [s for s in factors if s is not None]
        if len(known) < len(factors):
            return None
        ratios = [s * edge.ratio for s, edge in zip(known, self.own, strict=True)]
        return known[0] if ratios[0] == max(ratios) else None


def common_factor(before: CriticalCurvature, now: CriticalCurvature, where: slice = slice(None)) -> float | None:
    """Return s with c_now = c_before / s for all coordinates, or those in ``where``; None if there is none."""
    factors = _factors(before, now, where)
    if factors is None:
        return None
    if bool((factors == 1.0).all()):
        return 1.0
    assert now.c is not None
    s = float(factors.median())
    # c is stored in the parameters' precision.
    return s if bool(((factors / s - 1).abs() <= 8 * torch.finfo(now.c.dtype).eps).all()) else None


def factor_bounds(before: CriticalCurvature, now: CriticalCurvature, mode: Tensor) -> tuple[float, float] | None:
    """Return between which factors a positive edge ratio changes; None where they cannot be told.

    With A' = S^½ A S^½, S the factors on the coordinates: λ_max(A') is at least the quotient along S^-½ u, with u the
    top eigenvector of A, and at most the largest factor times λ_max(A).

    Args:
        before: Critical curvature that it was measured at.
        now: The present one.
        mode: Critical mode x, xᵀ C x = 1, ``(n,)``.
    """
    factors = _factors(before, now, slice(None))
    if factors is None or now.c is None or not len(factors) or not bool((factors > 0.0).all()):
        return None
    form = quadratic_form(now.c.to(mode.device), mode)
    return (1.0 / form, float(factors.max())) if form > 0.0 else None


def _factors(before: CriticalCurvature, now: CriticalCurvature, where: slice) -> Tensor | None:
    """Return c_before / c_now of the coordinates that have both; None if some have one only, or decay differs."""
    if before.c is None or now.c is None or before.c.shape != now.c.shape:
        return None
    known = torch.isfinite(before.c[where])
    same = torch.equal(before.l2[where], now.l2[where]) and torch.equal(known, torch.isfinite(now.c[where]))
    if not same:
        return None
    return before.c[where][known].double() / now.c[where][known].double()
