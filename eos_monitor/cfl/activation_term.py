r"""T of layers whose own activation is all that is curved before the next layers, in closed form.

.. math:: T v = P^\top \bigl(r''(z) \odot \partial L / \partial h \odot P v\bigr), \quad h = r(z).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from eos_monitor.cfl.activations import Activation
from eos_monitor.cfl.calls import LayerCall
from eos_monitor.cfl.coupling import Surroundings
from eos_monitor.cfl.regimes import row_slices


class SecondDerivatives:
    """Observer of `capture` that evaluates r″ of pre-activations while they pass.

    Attributes:
        by_call: Number of the call -> r″(z); none where r is piecewise linear.
    """

    def __init__(self) -> None:
        self.by_call: dict[int, Tensor] = {}

    def __call__(self, call: LayerCall, activation: Activation, z: Tensor, before: Tensor | None) -> None:
        """Evaluate r″ at one pre-activation."""
        self.by_call.pop(call.index, None)
        if not activation.piecewise_linear:
            slices = row_slices(activation, z)
            self.by_call[call.index] = torch.cat([activation.second_derivative(z[rows]) for rows in slices])


def activation_terms(
    loss: Tensor,
    layers: Iterable[Sequence[LayerCall]],
    surroundings: Mapping[str, Surroundings],
    second: Mapping[int, Tensor],
) -> dict[int, Tensor]:
    """Return r″(z) ∂L/∂h by the number of the call, for the layers that it is all of T for.

    Args:
        loss: Scalar loss, whose graph is kept.
        layers: Calls of each layer.
        surroundings: Name of a layer -> what lies behind it.
        second: Number of the call -> r″(z), which is overwritten.
    """
    edges: dict[int, GradientEdge] = {}
    for calls in layers:
        own = _activation_edges(calls)
        curved = surroundings[calls[0].name].curved
        if curved and len(own) == len(calls) and curved <= {edge.node for edge in own.values()}:
            edges |= {index: edge for index, edge in own.items() if index in second}
    if not edges:
        return {}
    gradients = torch.autograd.grad(loss, list(edges.values()), retain_graph=True, allow_unused=True)
    return {i: second[i].mul_(g) for i, g in zip(edges, gradients, strict=True) if g is not None}


def _activation_edges(calls: Iterable[LayerCall]) -> dict[int, GradientEdge]:
    """Return where h is, for the calls whose activation follows directly."""
    follow = {call.index: call.activation for call in calls if call.activation and not call.activation.via}
    return {index: activation.edge for index, activation in follow.items() if activation.edge is not None}
