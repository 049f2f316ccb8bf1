"""T of layers that no closed form serves: the curvature between a layer's output and the next layers.

In a second evaluation, from the same random state, each layer's output is cut off from what produced it, while its
input counts for what the first evaluation found the loss's gradient in it to be. What is left of the Hessian
of that sum is block-diagonal by construction: only the operations between a layer and the next ones are in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from eos_monitor.cfl.calls import LAYER_FUNCTIONS, Capture
from eos_monitor.cfl.loss_input import LossInput
from eos_monitor.cfl.objective import Objective


@dataclass(frozen=True, eq=False)
class Segment:
    """The operations between one call of a layer and the next layers."""

    z: Tensor  # the layer's output, cut off
    gradient: Tensor  # of the cut loss in z, with its graph


class CutMode(TorchFunctionMode):
    """Function mode that cuts the graph at every layer.

    Args:
        weights: Ids of the tensors that are layers' weights in this evaluation.
        gradients: Number of the call -> gradient of the loss in its output.
    """

    def __init__(self, weights: set[int], gradients: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._weights = weights
        self._gradients = gradients
        self._outputs: list[Tensor] = []
        self._ends: list[GradientEdge] = []
        self._gradients_of_ends: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        is_layer = getattr(func, "__name__", "") in LAYER_FUNCTIONS and id(weight) in self._weights
        if not (is_layer and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        x = args[0] if args else kwargs.pop("input")
        gradient = self._gradients.get(len(self._outputs))
        # A segment ends at the next layer's input: that layer is linear in it, but its double backward costs as if not.
        ends = x.requires_grad and gradient is not None
        at_input = x.detach().requires_grad_(ends)
        result = func(at_input, *args[1:], **kwargs)
        if ends:
            self._ends.append(get_gradient_edge(x))
            self._gradients_of_ends += torch.autograd.grad(result, at_input, gradient)
        cut = result.detach().requires_grad_()
        self._outputs.append(cut)
        return cut.clone()  # what follows may work in place, which a leaf forbids

    def segments(self, out: Sequence[tuple[GradientEdge, Tensor]], wanted: set[int]) -> dict[int, Segment]:
        """Return the segments behind the wanted calls that have curvature.

        Args:
            out: Where the tensor that the loss is a function of is in this evaluation's graph, and the loss's gradient
                in it; none where that tensor is the output of a layer.
            wanted: Numbers of the calls.
        """
        outputs = {number: self._outputs[number] for number in wanted}
        ends: list[Any] = [*self._ends, *(edge for edge, _ in out)]
        found = torch.autograd.grad(
            ends,
            list(outputs.values()),
            [*self._gradients_of_ends, *(gradient for _, gradient in out)],
            create_graph=True,
            allow_unused=True,
        )
        return {
            number: Segment(z, g)
            for (number, z), g in zip(outputs.items(), found, strict=True)
            if g is not None and g.requires_grad
        }


def cut_graph_segments(
    objective: Objective,
    i: int,
    parameters: Sequence[Tensor],
    captured: Capture,
    loss_input: LossInput,
    wanted: set[int],
) -> dict[int, Segment]:
    """Return the segments behind the wanted calls of batch ``i`` that have curvature, from a second evaluation.

    Args:
        objective: The mean loss.
        i: Number of the batch.
        parameters: Trained parameters.
        captured: The first evaluation, whose graph is kept.
        loss_input: What the loss is a function of in it.
        wanted: Numbers of the calls.
    """
    edges = [loss_input.edge, *(call.output_edge for call in captured.layers)]
    gradients = torch.autograd.grad(captured.loss.reshape(()), edges, retain_graph=True, allow_unused=True)
    at_calls = {call.index: g for call, g in zip(captured.layers, gradients[1:], strict=True) if g is not None}
    stand_ins = {p: p.detach() for p in parameters}
    mode = CutMode({id(p) for p in stand_ins.values()}, at_calls)
    with mode:
        again = objective.capture(i, stand_ins)
    # A layer's output is an end already.
    edge = loss_input.edge_in(again)
    out = [] if edge is None else [(edge, gradients[0])]
    return mode.segments(out, wanted)
