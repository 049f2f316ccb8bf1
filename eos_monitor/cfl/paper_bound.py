"""The papers' stability bound of a layer, with and without its window. It is not predictive: see `PaperBound`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eos_monitor.cfl.activations import Activation
from eos_monitor.cfl.calls import LayerCall
from eos_monitor.cfl.linear_maps import WeightMap
from eos_monitor.curvature.lanczos import lanczos

_GRID = torch.linspace(-6.0, 6.0, 1201, dtype=torch.float64, device="cpu")  # has 0, where r″ of Swish is largest


@dataclass(frozen=True)
class PaperBound:
    r"""Curvature of a layer as the papers bound it, from the linearization about z = 0.

    .. math:: \tfrac12 \beta \sum_n |\hat a_n| \max_\omega \sum_c |\hat I_{n,c}(\omega)|^2, \qquad
              \tfrac12 \beta \; \lambda_{\max}\Bigl(\sum_n |\hat a_n| \sum_x p_{n,x} p_{n,x}^\top\Bigr),

    without and with the window of the kernel, p the patches of the layer's input I and ½β standing for max |r″|.
    :math:`\hat a = a\gamma` is the gradient of the loss behind the activation as one number a sample, here the most
    stringent one. **Not predictive**: against the layer's Hessian the form without a window was measured off by
    factors of 0.02 to 400, and it ranks layers badly. It leaves out what dominates once the loss moves (Gauss–Newton),
    and takes every unit to be in the bend.

    Attributes:
        curvature: Without a window.
        window_curvature: With it; never larger.

    Note:
        Two departures from the papers: â = aγ in section 5.5 (printed âγ), and for a > 0 the upper bound on the weight
        decay has the largest :math:`|\hat I|^2`, not the smallest.

    References:
        Sun, Lao, Yezzi, Sundaramoorthi, "A PDE-based Explanation of Extreme Numerical Sensitivities and Edge of
        Stability in Training Neural Networks", arXiv 2206.02001, theorem 5.4, eqs. 14 and 23, appendix D.3.
    """

    curvature: float
    window_curvature: float

    def alpha_min(self, *, window: bool = True) -> float:
        """Return the weight decay below which the linearization is unstable where a < 0."""
        return self.window_curvature if window else self.curvature

    def lr_max(self, weight_decay: float = 0.0, *, window: bool = True) -> float:
        """Return 2 / (α + curvature), above which gradient descent on the linearization is unstable where a > 0."""
        total = weight_decay + (self.window_curvature if window else self.curvature)
        return 2.0 / total if total > 0.0 else math.inf


def activation_gradients(loss: Tensor, calls: Iterable[LayerCall]) -> list[tuple[LayerCall, Tensor]]:
    """Return the calls that an activation follows, with the gradient of the loss behind it; the graph is kept."""
    follow = [(call, call.activation) for call in calls if call.activation]
    edges = [activation.edge for _, activation in follow if activation.edge is not None]
    found = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
    return [(call, g) for (call, _), g in zip(follow, found, strict=True) if g is not None]


def paper_bound(calls: Sequence[LayerCall], gradients: Sequence[Tensor], activation: Activation) -> PaperBound:
    """Evaluate the bound of one layer.

    Args:
        calls: Calls of the layer, one for each batch.
        gradients: For each call, the gradient of the mean loss over all batches behind the activation, samples first.
        activation: The activation.
    """
    bend = float(activation.second_derivative(_GRID).abs().max())
    stringent = [g.abs().reshape(len(g), -1).amax(1) for g in gradients]
    free = sum(float((a.double() * _spectral_peak(call)).sum()) for a, call in zip(stringent, calls, strict=True))
    return PaperBound(bend * free, bend * _patch_eigenvalue(calls, stringent) if free > 0.0 else 0.0)


def _spectral_peak(call: LayerCall) -> Tensor:
    """Return max_ω Σ_c |Î_c(ω)|² of each sample's input, ``(samples,)``; its squared length where it has no window."""
    x = call.x.detach().double()
    if call.op == "linear":
        return x.square().reshape(len(x), -1).sum(1)
    power = torch.fft.fftn(x, dim=list(range(2, x.ndim))).abs().square()
    groups = call.options.get("groups", 1)
    by_group: Tensor = power.reshape(len(x), groups, -1, *x.shape[2:]).sum(2)
    return by_group.reshape(len(x), -1).amax(1)


def _patch_eigenvalue(calls: Sequence[LayerCall], weights: Sequence[Tensor]) -> float:
    """Return λ_max of the weighted sum of p pᵀ over samples and positions."""
    # One output channel for each group of inputs sees each patch once.
    groups = calls[0].options.get("groups", 1)
    full = calls[0].weight.detach()
    one = full[:, :1] if calls[0].op.startswith("conv_transpose") else full[:: len(full) // groups]
    maps = [WeightMap(replace(call, weight=one)) for call in calls]

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(one)
        for weight_map, weight in zip(maps, weights, strict=True):
            y = weight_map.apply(v.view(one.shape))
            total += weight_map.transpose(y * weight.view(-1, *[1] * (y.ndim - 1)))
        return total.reshape(-1)

    with torch.no_grad():
        spectrum = lanczos(product, size=one.numel(), dtype=one.dtype, device=one.device, rtol=1e-4)
    return float(spectrum.eigenvalues[0])
