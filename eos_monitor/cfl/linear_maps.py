"""A layer as a linear map of its weight: P v is its output with the weight v and no bias, Pᵀ its transpose."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eos_monitor.cfl.calls import LayerCall

LAYER_OPS = ("linear", *(f"{kind}{d}d" for kind in ("conv", "conv_transpose") for d in (1, 2, 3)))


class WeightMap:
    """P and Pᵀ of one call of a layer, detached.

    Args:
        call: The call; its input is kept.
    """

    def __init__(self, call: LayerCall) -> None:
        self._linear = call.op == "linear"
        self.x, self._shape = call.x.detach(), call.weight.shape
        self._arguments = () if self._linear else self._convolution(call)

    def apply(self, v: Tensor) -> Tensor:
        """Return P v, of the layer's output's shape, for v of the weight's shape."""
        if self._linear:
            return F.linear(self.x, v)
        return torch.convolution(self.x, v, None, *self._arguments)

    def transpose(self, c: Tensor) -> Tensor:
        """Return Pᵀ c, of the weight's shape: the weight's gradient when c is the output's."""
        if self._linear:
            return c.reshape(-1, c.shape[-1]).T @ self.x.reshape(-1, self.x.shape[-1])
        weight = c.new_empty(()).expand(self._shape)  # only its shape is looked at
        gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            c, self.x, weight, None, *self._arguments, (False, True, False)
        )
        return gradients[1]

    def _convolution(self, call: LayerCall) -> tuple[Any, ...]:
        """Return the arguments of ``torch.convolution`` behind the bias; pad the input where they cannot say how."""
        d, options = call.weight.ndim - 2, call.options
        stride, dilation = (_as_tuple(options.get(key, 1), d) for key in ("stride", "dilation"))
        padding = options.get("padding", 0)
        if padding == "same":
            totals = [step * (k - 1) for step, k in zip(dilation, call.weight.shape[2:], strict=True)]
            sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
            self.x = F.pad(self.x, sides)
        padding = 0 if isinstance(padding, str) else padding
        extra = _as_tuple(options.get("output_padding", 0), d)
        transposed = call.op.startswith("conv_transpose")
        return stride, _as_tuple(padding, d), dilation, transposed, extra, options.get("groups", 1)


def _as_tuple(value: Any, d: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * d if len(values) == 1 else values
