"""Records of what one evaluation of a loss went through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from eos_monitor.cfl.activations import Activation

_CONV = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
# function -> names of its arguments after input, weight and bias
LAYER_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "linear": (),
    **{f"conv{d}d": _CONV for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _TRANSPOSED for d in (1, 2, 3)},
}


@dataclass(frozen=True)
class ActivationCall:
    """The one elementwise activation that a layer's output went through.

    Attributes:
        activation: The function.
        via: What lies between the layer and it, in order, ``()`` if nothing.
        edge: Gradient edge of its output; None where no graph was recorded.
        shape: Shape of its output.
    """

    activation: Activation
    via: tuple[str, ...]
    edge: GradientEdge | None
    shape: torch.Size


@dataclass(frozen=True)
class BatchNormCall:
    """A batch normalization with the batch's own statistics, right behind a layer."""

    weight: Tensor | None
    eps: float
    edge: GradientEdge | None  # of its output


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer; a layer that is used twice has two.

    Attributes:
        name: Path of the module that owns the weight (of the weight itself where that is not called ``weight``).
        index: Number of the call, from 0.
        op: Function of ``torch.nn.functional`` that was called.
        options: Its arguments after input, weight and bias, by name.
        x: Input, as it was passed: already padded where the module has a padding mode.
        weight: Stand-in of the parameter in this evaluation.
        bias: Bias that was passed, if any.
        parameter: The live parameter.
        edge: Gradient edge of the output z; None where no graph was recorded.
        shape: Shape of z.
        dtype: Type of z.
        activation: What follows, or None.
        batch_norm: The batch normalization in train mode right behind it, or None.
        reason: Why there is no activation, in words; empty if there is one.
    """

    name: str
    index: int
    op: str
    options: Mapping[str, Any]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    parameter: Tensor
    edge: GradientEdge | None
    shape: torch.Size
    dtype: torch.dtype
    activation: ActivationCall | None = None
    batch_norm: BatchNormCall | None = None
    reason: str = ""

    @property
    def output_edge(self) -> GradientEdge:
        """Gradient edge of z, in an evaluation that recorded a graph."""
        assert self.edge is not None
        return self.edge

    @property
    def normalized_edge(self) -> GradientEdge:
        """Gradient edge behind the batch normalization in train mode that follows; of z where none does."""
        behind = None if self.batch_norm is None else self.batch_norm.edge
        return self.output_edge if behind is None else behind

    def apply(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's function of its input, detached, with another weight and bias."""
        function: Callable[..., Tensor] = getattr(F, self.op)
        return function(self.x.detach(), weight, bias, **self.options)


@dataclass(frozen=True, eq=False)
class LossCall:
    """A call of one of torch's loss functions."""

    name: str
    input: Tensor  # logits, log-probabilities of nll_loss, or predictions; part of the graph
    edge: GradientEdge | None  # of the input
    loss: Tensor  # what it returned


@dataclass(frozen=True, eq=False)
class Capture:
    """What one evaluation of a loss went through.

    Attributes:
        layers: Calls of layers with trainable weights, in order.
        loss_calls: Calls of torch's loss functions.
        output: What the root module's forward returned last, if that was a tensor.
        loss: What ``loss_fn`` returned.
        not_attributed: Weight of at least two dimensions that no layer call was seen of -> reason.
    """

    layers: tuple[LayerCall, ...]
    loss_calls: tuple[LossCall, ...]
    output: Tensor | None
    loss: Tensor
    not_attributed: Mapping[str, str]

    @property
    def loss_call(self) -> LossCall | None:
        """The loss call whose result was returned, if it was the only one."""
        if len(self.loss_calls) == 1 and self.loss_calls[0].loss is self.loss:
            return self.loss_calls[0]
        return None


# Called before an activation runs: the layer's call, the activation, its input, and that input as it would be with the
# layer's previous weight and bias (None unless they were given). A later notice for the same call replaces an earlier
# one: x · sigmoid(x) is first seen as a sigmoid.
Observer = Callable[[LayerCall, Activation, Tensor, Tensor | None], None]
