r"""T + GN of one layer, as an operator on its weight.

With P the map from the layer's weight to its output, g the gradient of a probe's projection on the net's output, and
T_z the curvature between the layer's output and the next layers,

.. math:: (T + GN_m)\, v = P^\top \bigl(T_z P v + \tfrac1m \sum_r s_r g^{(r)}\bigr), \quad
          s_{n,r} = \langle g^{(r)}_n, (P v)_n \rangle,

one application of the layer and one weight gradient for T and all probes together, over the samples n. No vector of
the weight's size is made for a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from eos_monitor.cfl.coupling import Surroundings
from eos_monitor.cfl.cut_graph import Segment
from eos_monitor.cfl.linear_maps import BatchNormJacobian, WeightMap


@dataclass(frozen=True, eq=False)
class CallTerms:
    """T and GN of one call of a layer on one batch, in terms of the layer's output z.

    Attributes:
        weight_map: P.
        probe_gradients: g of each probe, ``(samples, m, entries of z in one sample)``.
        shape: Shape of z.
        batch_norm: Jacobian of the batch normalization in train mode behind z, at whose output g is then taken.
        activation: T_z = r″(z) ∂L/∂h, where the layer's own activation is all of it.
        segment: What T_z is a double backward of elsewhere; None where nothing is curved.
    """

    weight_map: WeightMap
    probe_gradients: Tensor
    shape: torch.Size
    batch_norm: BatchNormJacobian | None
    activation: Tensor | None
    segment: Segment | None

    def first_probe(self) -> Tensor:
        """Return Pᵀ g of the first probe."""
        g = self.probe_gradients[:, 0].reshape(self.shape)
        return self.weight_map.transpose(g if self.batch_norm is None else self.batch_norm.apply(g))

    def projections(self, y: Tensor) -> Tensor:
        """Return s of y = P v, ``(samples, m)``."""
        y = y if self.batch_norm is None else self.batch_norm.apply(y)
        # This way round it is a matrix product; probes times a column takes ten times as long.
        return torch.bmm(y.reshape(len(self.probe_gradients), 1, -1), self.probe_gradients.mT)[:, 0]

    def gauss_newton_term(self, s: Tensor) -> Tensor:
        """Return (1/m) Σ s g, of z's shape."""
        c = torch.bmm(s[:, None] / s.shape[1], self.probe_gradients).reshape(self.shape)
        return c if self.batch_norm is None else self.batch_norm.apply(c)


@dataclass(eq=False)
class LayerCurvature:
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
    _batches: list[tuple[float, list[CallTerms]]] = field(default_factory=list)  # share of the samples, calls
    _projections: list[list[Tensor]] = field(default_factory=list)  # s of each product and batch

    @property
    def cut(self) -> bool:
        """Whether T comes from the cut graph."""
        return any(call.segment is not None for _, calls in self._batches for call in calls)

    def add(self, share: float, calls: list[CallTerms]) -> None:
        """Add the calls of one batch with its share of the samples."""
        self._batches.append((share, calls))

    def start(self) -> Tensor:
        """Return Pᵀ of the first probe, flat: random with covariance GN, which is half a step of power iteration."""
        with torch.no_grad():
            batches = [
                share * reduce(torch.add, [call.first_probe() for call in calls]) for share, calls in self._batches
            ]
            return reduce(torch.add, batches).reshape(-1)

    def matvec(self, v: Tensor) -> Tensor:
        """Return ``(T + GN) v``, flat."""
        self.products += 1
        weight = v.view(self.parameter.shape)
        total = torch.zeros_like(weight)
        projections = []
        for share, calls in self._batches:
            with torch.no_grad():
                outputs = [call.weight_map.apply(weight) for call in calls]
                s = reduce(torch.add, [call.projections(y) for call, y in zip(calls, outputs, strict=True)])
                projections.append(s)
                cotangents = [call.gauss_newton_term(s) for call in calls]
            _add_activation_terms(cotangents, calls, outputs)
            _add_cut_graph_terms(cotangents, calls, outputs)
            with torch.no_grad():
                gradients = [call.weight_map.transpose(c) for call, c in zip(calls, cotangents, strict=True)]
                total += share * reduce(torch.add, gradients)
        self._projections.append(projections)
        return total.reshape(-1)

    def gauss_newton_form(self, coefficients: Sequence[float]) -> float:
        """Return vᵀ GN v of a combination of the vectors that were multiplied; s is linear in v and has been seen."""
        total = 0.0
        for i, (share, _) in enumerate(self._batches):
            s = reduce(torch.add, [c * made[i] for c, made in zip(coefficients, self._projections, strict=True)])
            total += share * float(s.square().sum()) / s.shape[1]
        return total


def _add_activation_terms(cotangents: Sequence[Tensor], calls: Sequence[CallTerms], outputs: Sequence[Tensor]) -> None:
    """Add r″(z) ∂L/∂h ⊙ y of each call that it is T_z of."""
    for call, y, c in zip(calls, outputs, cotangents, strict=True):
        if call.activation is not None:
            c.addcmul_(call.activation, y)


def _add_cut_graph_terms(cotangents: Sequence[Tensor], calls: Sequence[CallTerms], outputs: Sequence[Tensor]) -> None:
    """Add T_z y of the calls with a segment, in one double backward: those of a batch may meet in the next layer."""
    cut = [(i, call.segment) for i, call in enumerate(calls) if call.segment is not None]
    if not cut:
        return
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
