"""The last measurement, followed through the steps after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from eos_monitor.forecast.lookahead import edge_ratio_at
from eos_monitor.limits.thresholds import learning_rates
from eos_monitor.readings.reading import Measurement

_FOLLOWED = 0.05  # relative change of 1 − β from which on it is followed


class TrackedReading:
    """What the last measurement says of the steps after it.

    Args:
        measurement: The measurement; None before the first.
        before: What was followed before it.

    Attributes:
        measurement: The measurement.
        direction: w = C x of the critical mode x, so that ⟨w, Δθ⟩ is the update along it; None without an edge ratio.
    """

    def __init__(self, measurement: Measurement | None, before: TrackedReading | None = None) -> None:
        self.measurement = measurement
        self.direction: Tensor | None = None
        self._averages: tuple[float, ...] | None = None
        self._factor = 1.0
        if measurement is None or measurement.mode is None or measurement.curvature.c is None:
            return
        c = measurement.curvature.c.to(measurement.mode.device, measurement.mode.dtype)
        self.direction = torch.where(torch.isfinite(c), c, 0.0) * measurement.mode
        last = None if before is None else before.direction
        if last is not None and last.shape == self.direction.shape and float(last @ self.direction) < 0.0:
            self.direction.neg_()  # an eigenvector has no sign; the series of projections needs one

    def edge_ratio(self, optimizers: Sequence[Optimizer]) -> float | None:
        """Return the edge ratio at the present settings if more than learning rates has changed; None if not.

        A scheduler that moves momentum or betas changes a little at each step, and the critical curvature has as many
        entries as there are parameters: it is read again when 1 − β has changed by 5 %.
        """
        measurement = self.measurement
        if measurement is None or measurement.reading.edge_ratio is None or not measurement.reading.edge_ratio > 0.0:
            return None
        averages = _averages(optimizers)
        if self._averages is None:
            self._averages = averages
        changed = averages != self._averages and any(
            abs(now - then) > _FOLLOWED * then for now, then in zip(averages, self._averages, strict=False)
        )
        if not changed and self._factor == 1.0:
            return None
        scale = _lr_scale(measurement.reading.lr, learning_rates(optimizers))
        if scale is None:
            return None
        if changed:
            self._averages = averages
            unchanged: list[list[dict[str, Any]]] = [[{} for _ in o.param_groups] for o in optimizers]
            ratio = edge_ratio_at(measurement, optimizers, unchanged)
            self._factor = 1.0 if ratio is None else ratio / (scale * measurement.reading.edge_ratio)
        return None if self._factor == 1.0 else self._factor * scale * measurement.reading.edge_ratio


def _averages(optimizers: Sequence[Optimizer]) -> tuple[float, ...]:
    """Return 1 − β of every group, of momentum and of betas alike."""
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            betas = group.get("betas")
            values = betas if isinstance(betas, (tuple, list)) else (group.get("momentum") or 0.0,)
            found += [1.0 - float(value) for value in values]
    return tuple(found)


def _lr_scale(before: Sequence[float], now: Sequence[float]) -> float | None:
    factors = [b / a for a, b in zip(before, now, strict=False) if a > 0.0]
    same = bool(factors) and all(math.isclose(factor, factors[0], rel_tol=1e-6) for factor in factors)
    return factors[0] if same else None
