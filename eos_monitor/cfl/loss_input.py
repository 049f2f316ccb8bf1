"""The net's output: the one tensor that the loss is a function of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from eos_monitor.cfl.calls import Capture
from eos_monitor.cfl.coupling import reaches_around
from eos_monitor.cfl.gauss_newton import NotSeparableError

_LAST_LAYER = "last layer"


@dataclass(frozen=True, eq=False)
class LossInput:
    """The tensor that the loss is a function of.

    Attributes:
        origin: What the tensor is: the input of a loss function, the root's output or the last layer's.
        edge: Where it is in the graph.
        values: Its values, up to a constant in each row.
    """

    origin: str
    edge: GradientEdge
    values: Tensor

    def edge_in(self, again: Capture) -> GradientEdge | None:
        """Return where it is in another evaluation; None where it is the output of a layer."""
        return None if self.origin == _LAST_LAYER else _candidates(again)[self.origin][0]


def loss_input(captured: Capture) -> LossInput:
    """Find the tensor that the loss is a function of.

    Raises:
        NotSeparableError: If there is none.
    """
    layers = [call.output_edge.node for call in captured.layers]
    candidates = _candidates(captured)
    for origin, (edge, values) in candidates.items():
        if not reaches_around(captured.loss.grad_fn, edge.node, layers):
            return LossInput(origin, edge, values.detach())
    last = captured.layers[-1]
    if not reaches_around(captured.loss.grad_fn, last.output_edge.node, layers):
        # What a layer returned is not kept.
        return LossInput(_LAST_LAYER, last.output_edge, last.apply(last.weight, last.bias).detach())
    raise NotSeparableError(
        "the loss is not a function of one output tensor alone; exact=True measures it all the same"
    )


def _candidates(captured: Capture) -> dict[str, tuple[GradientEdge, Tensor]]:
    """Return what the loss may be a function of: what it was called with, and what the root returned."""
    found: dict[str, tuple[GradientEdge, Tensor]] = {}
    edge = captured.loss_calls[0].edge if len(captured.loss_calls) == 1 else None
    if edge is not None:
        call = captured.loss_calls[0]
        # The curvature of a log-softmax belongs to the loss.
        if call.name == "nll_loss" and edge.node.name().startswith("LogSoftmax"):
            node, number = edge.node.next_functions[0]
            assert node is not None
            edge = GradientEdge(node, number)
        found["loss"] = edge, call.input
    if captured.output is not None and captured.output.requires_grad:
        found["root"] = get_gradient_edge(captured.output), captured.output
    return found
