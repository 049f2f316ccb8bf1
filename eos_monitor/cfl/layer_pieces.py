r"""T + GN of every layer, from one or two evaluations of the loss.

With P the map from a layer's weight to its output, g the gradient of a probe's projection on the net's output, and
T_z the curvature between the layer's output and the next layers,

.. math:: (T + GN_m)\, v = P^\top \bigl(T_z P v + \tfrac1m \sum_r s_r g^{(r)}\bigr), \quad
          s_{n,r} = \langle g^{(r)}_n, (P v)_n \rangle,

one application of the layer and one weight gradient for T and all probes together, over the samples n. No vector of
the weight's size is made for a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eos_monitor.cfl.calls import LayerCall
from eos_monitor.cfl.coupling import Surroundings
from eos_monitor.cfl.cut_graph import Segment
from eos_monitor.cfl.linear_maps import WeightMap


@dataclass(frozen=True, eq=False)
class BatchStatistics:
    """Jacobian of a batch normalization in train mode; it is its own transpose."""

    normalized: Tensor
    scale: Tensor  # γ/σ, one a channel

    @classmethod
    def of(cls, call: LayerCall, weight_map: WeightMap) -> BatchStatistics:
        """Return that of the batch normalization behind a call."""
        norm = call.batch_norm
        assert norm is not None
        with torch.no_grad():
            z = weight_map.apply(call.weight.detach())  # a bias changes nothing here
            axes = [axis for axis in range(z.ndim) if axis != 1]
            deviation = (z.var(axes, unbiased=False, keepdim=True) + norm.eps).rsqrt()
            normalized = (z - z.mean(axes, keepdim=True)) * deviation
            gain = 1.0 if norm.weight is None else norm.weight.detach().view_as(deviation)
            return cls(normalized, gain * deviation)

    def apply(self, t: Tensor) -> Tensor:
        """Return the Jacobian times ``t``."""
        axes = [axis for axis in range(t.ndim) if axis != 1]
        along = self.normalized * (self.normalized * t).mean(axes, keepdim=True)
        return self.scale * (t - t.mean(axes, keepdim=True) - along)


@dataclass(eq=False)
class Use:
    """One call of a layer on one batch."""

    weight_map: WeightMap
    probes: Tensor  # (samples, m, entries of z in one sample)
    shape: torch.Size  # of z
    bend: Tensor | None  # r″(z) ∂L/∂h
    statistics: BatchStatistics | None
    segment: Segment | None = None

    def first_probe(self) -> Tensor:
        """Return Pᵀ g of the first probe."""
        g = self.probes[:, 0].reshape(self.shape)
        return self.weight_map.transpose(g if self.statistics is None else self.statistics.apply(g))

    def project(self, y: Tensor) -> Tensor:
        """Return s, ``(samples, m)``."""
        y = y if self.statistics is None else self.statistics.apply(y)
        # This way round it is a matrix product; probes times a column takes ten times as long.
        return torch.bmm(y.reshape(len(self.probes), 1, -1), self.probes.mT)[:, 0]

    def spread(self, s: Tensor, y: Tensor) -> Tensor:
        """Return (1/m) Σ s g of y's shape."""
        c = torch.bmm(s[:, None] / s.shape[1], self.probes).reshape(y.shape)
        return c if self.statistics is None else self.statistics.apply(c)


@dataclass(eq=False)
class LayerPieces:
    """T + GN of one layer.

    Attributes:
        name: Name of the layer.
        parameter: Its weight.
        surroundings: What lies behind it.
        products: Products that were made.
    """

    name: str
    parameter: Tensor
    surroundings: Surroundings
    products: int = 0
    _parts: list[tuple[float, list[Use]]] = field(default_factory=list)  # share of the samples, uses
    _projections: list[list[Tensor]] = field(default_factory=list)  # s of each product and part

    @property
    def cut(self) -> bool:
        """Whether T comes from the cut graph."""
        return any(use.segment is not None for _, uses in self._parts for use in uses)

    def add(self, share: float, uses: list[Use]) -> None:
        """Add one batch with its share of the samples."""
        self._parts.append((share, uses))

    def start(self) -> Tensor:
        """Return Pᵀ of the first probe, flat: random with covariance GN, which is half a step of power iteration."""
        with torch.no_grad():
            return sum_of(share * sum_of(use.first_probe() for use in uses) for share, uses in self._parts).reshape(-1)

    def matvec(self, v: Tensor) -> Tensor:
        """Return ``(T + GN) v``, flat."""
        self.products += 1
        weight = v.view(self.parameter.shape)
        total, projections = torch.zeros_like(weight), []
        for share, uses in self._parts:
            with torch.no_grad():
                outputs = [use.weight_map.apply(weight) for use in uses]
                s = sum_of(use.project(y) for use, y in zip(uses, outputs, strict=True))
                projections.append(s)
                cotangents = [use.spread(s, y) for use, y in zip(uses, outputs, strict=True)]
            _add_bends(cotangents, uses, outputs)
            with torch.no_grad():
                total += share * sum_of(use.weight_map.transpose(c) for use, c in zip(uses, cotangents, strict=True))
        self._projections.append(projections)
        return total.reshape(-1)

    def gauss_newton_form(self, coefficients: Sequence[float]) -> float:
        """Return vᵀ GN v of a combination of the vectors that were multiplied; s is linear in v and has been seen."""
        total = 0.0
        for i, (share, _) in enumerate(self._parts):
            s = sum_of(c * made[i] for c, made in zip(coefficients, self._projections, strict=True))
            total += share * float(s.square().sum()) / s.shape[1]
        return total


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Sum tensors, of which there is at least one."""
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total + term
    assert total is not None
    return total


def _add_bends(cotangents: Sequence[Tensor], uses: Sequence[Use], outputs: Sequence[Tensor]) -> None:
    """Add T_z y of each use."""
    cut = [(i, use.segment) for i, use in enumerate(uses) if use.segment is not None]
    for use, y, c in zip(uses, outputs, cotangents, strict=True):
        if use.bend is not None:
            c.addcmul_(use.bend, y)
    if cut:
        products = torch.autograd.grad(
            [segment.gradient for _, segment in cut],
            [segment.z for _, segment in cut],
            [outputs[i] for i, _ in cut],
            retain_graph=True,
            allow_unused=True,
        )
        for (i, _), product in zip(cut, products, strict=True):
            if product is not None:
                cotangents[i].add_(product)
