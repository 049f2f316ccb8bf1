"""Linear maps of the formula: a layer as one of its weight, and the Jacobian of the batch normalization behind it.

P v is the layer's output with the weight v and no bias, Pᵀ its transpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eos_monitor.cfl.calls import LayerCall


class WeightMap:
    """P and Pᵀ of one call of a layer, detached.

    Args:
        call: The call; its input is kept.
    """

    def __init__(self, call: LayerCall) -> None:
        self._linear = call.op == "linear"
        self.x = call.x.detach()
        self._shape = call.weight.shape
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
        d = call.weight.ndim - 2
        options = call.options
        stride = _as_tuple(options.get("stride", 1), d)
        dilation = _as_tuple(options.get("dilation", 1), d)
        padding = options.get("padding", 0)
        if padding == "same":
            totals = [step * (k - 1) for step, k in zip(dilation, call.weight.shape[2:], strict=True)]
            sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
            self.x = F.pad(self.x, sides)
        padding = 0 if isinstance(padding, str) else padding
        extra = _as_tuple(options.get("output_padding", 0), d)
        transposed = call.op.startswith("conv_transpose")
        return stride, _as_tuple(padding, d), dilation, transposed, extra, options.get("groups", 1)


@dataclass(frozen=True, eq=False)
class BatchNormJacobian:
    """J of a batch normalization in train mode; it is its own transpose.

    Attributes:
        normalized: z without mean and scale over the batch.
        scale: γ/σ, one a channel.
    """

    normalized: Tensor
    scale: Tensor

    @classmethod
    def behind(cls, call: LayerCall, weight_map: WeightMap) -> BatchNormJacobian | None:
        """Return that of the batch normalization right behind a call, if there is one."""
        norm = call.batch_norm
        if norm is None:
            return None
        with torch.no_grad():
            z = weight_map.apply(call.weight.detach())  # a bias changes nothing here
            axes = [axis for axis in range(z.ndim) if axis != 1]
            deviation = (z.var(axes, unbiased=False, keepdim=True) + norm.eps).rsqrt()
            normalized = (z - z.mean(axes, keepdim=True)) * deviation
            gain = 1.0 if norm.weight is None else norm.weight.detach().view_as(deviation)
            return cls(normalized, gain * deviation)

    def apply(self, t: Tensor) -> Tensor:
        """Return J t."""
        axes = [axis for axis in range(t.ndim) if axis != 1]
        along = self.normalized * (self.normalized * t).mean(axes, keepdim=True)
        return self.scale * (t - t.mean(axes, keepdim=True) - along)


def _as_tuple(value: Any, d: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * d if len(values) == 1 else values
