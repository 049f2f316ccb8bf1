"""The shares of a layer's pre-activations that are activated, transitioning and not activated."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from eos_monitor.cfl.activations import Activation
from eos_monitor.cfl.calls import Capture, LayerCall
from eos_monitor.cfl.capture import capture, layer_names
from eos_monitor.cfl.partition import ACTIVATED, NOT_ACTIVATED, TRANSITIONING
from eos_monitor.isolation.sandbox import LossFn, Sandbox

KINK_WIDTH = 0.1
_SLICE = 1 << 17  # entries; what is computed for them stays in the cache


class RegimeShares(NamedTuple):
    """Shares of one layer's entries, scalars in [0, 1] that sum to 1."""

    activated: Tensor
    transitioning: Tensor
    not_activated: Tensor


class RegimeCounter:
    """Observer of `capture` that counts the regimes of pre-activations while they pass, and keeps none of them.

    Args:
        kink_width: Distance from a kink within which an entry is transitioning where no previous parameters are given.
    """

    def __init__(self, kink_width: float = KINK_WIDTH) -> None:
        self._kink_width = kink_width
        self._by_call: dict[int, Tensor] = {}

    def __call__(self, call: LayerCall, activation: Activation, z: Tensor, before: Tensor | None) -> None:
        """Count one pre-activation."""
        if z.numel() == 0:
            raise ValueError(
                f"Expected a batch with at least one sample, got none: layer {call.name!r} has a pre-activation of "
                f"shape {tuple(z.shape)}."
            )
        # What the last update moved it by; numbers that are not finite are in no regime.
        reach = self._kink_width if before is None else (z - before).abs().to(torch.promote_types(z.dtype, torch.float))
        counts = [
            activation.counts(z[rows], reach[rows] if isinstance(reach, Tensor) else reach)
            for rows in row_slices(activation, z)
        ]
        self._by_call[call.index] = reduce(torch.add, counts)

    def counts(self, captured: Capture) -> dict[str, Tensor]:
        """Return layer -> counts ``(3,)`` in the order of the regimes' numbers, summed over the layer's calls."""
        total: dict[str, Tensor] = {}
        for call in captured.layers:
            if call.activation is not None and call.index in self._by_call:
                total[call.name] = total.get(call.name, 0) + self._by_call[call.index]
        return total


def row_slices(activation: Activation, z: Tensor) -> list[slice]:
    """Return slices of rows: fresh memory for a function of all of z costs more than its arithmetic."""
    if z.ndim < 2 or z.numel() == 0 or isinstance(activation.scale, Tensor):  # a tensor may go along the rows
        return [slice(None)]
    step = max(1, _SLICE * len(z) // z.numel())
    return [slice(i, i + step) for i in range(0, len(z), step)]


class _Reference:
    """The module, not as a sub-module of the metric; a copy of the metric refers to the same one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        # Unless the module itself is being copied, with the metric as its attribute.
        return _Reference(memo.get(id(self.module), self.module))


class ActivationRegimes(Metric):
    r"""Shares of each layer's pre-activations in the three regimes of its activation.

    Of the (sample × position × channel) entries z of a Linear, convolution or transposed convolution layer that go
    into an elementwise activation r, over all batches since the last reset:

    - *transitioning* where :math:`|r''(z)| \ge \tfrac12 \max |r''|`; for SiLU \|z\| < 1.171/β, for GELU \|z\| < 0.794,
      for tanh 0.203 < \|z\| < 1.396,
    - else *activated* where :math:`|r'(z)| \ge \tfrac12 \sup |r'|`,
    - else *not activated*.

    At kinks (ReLU, LeakyReLU, …) r″ does not exist: there z is transitioning where \|z − kink\| ≤ \|Δz\|, with Δz what
    the layer's own last update (ΔW, Δb) moved it by, if the parameters from before that update are given, and within
    ``kink_width`` else. Modules and functions (``F.relu``, ``x.relu_()``, ``x * torch.sigmoid(x)``) are alike.

    The shares describe; they do not explain. Over 138 measured layers and states, the transitioning share and the
    activation's share of the layer's curvature had a rank correlation of 0.49, and a negative one in a tanh net.

    Measured in a forward pass of its own inside a sandbox: nothing of the module changes, and no hook stays.

    Args:
        module: Module whose layers are measured; not copied, and not made a part of the metric.
        kink_width: Distance from a kink that counts as transitioning where there is no update to tell, ≥ 0, in units
            of the pre-activation. A convention without a source.
        kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ValueError: If the module has no parameter that could be the weight of such a layer, or ``kink_width`` < 0.

    Note:
        Departures from the paper: it tells the regimes of Swish by K*I ≫ 0, ≈ 0 and ≪ 0 without a border, takes
        r′ = 1, linear and 0 in them, and linearizes about K*I = 0 for a whole kernel at a time. Here each entry is
        judged by itself, borders follow from r″, and functions with two bends (tanh, sigmoid) have two bands. Layers
        behind which a normalization or a residual sum comes first are judged at the activation's input, and those
        without an elementwise activation have no shares (see ``not_attributed``).

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.SiLU())
        >>> _ = torch.nn.init.ones_(net[0].weight)
        >>> regimes = ActivationRegimes(net)
        >>> regimes.update(lambda m, x: m(x).sum(), torch.tensor([[-3.0], [0.5], [1.0], [4.0]]))
        >>> {layer: [float(share) for share in shares] for layer, shares in regimes.compute().items()}
        {'0': [0.25, 0.5, 0.25]}

    References:
        Sun, Lao, Yezzi, Sundaramoorthi, "A PDE-based Explanation of Extreme Numerical Sensitivities and Edge of
        Stability in Training Neural Networks", arXiv 2206.02001, section 5.4, table 3, appendix D.5.
    """

    full_state_update = False
    counts: Tensor  # (layers, 3)

    def __init__(self, module: nn.Module, *, kink_width: float = KINK_WIDTH, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not kink_width >= 0.0:
            raise ValueError(f"Expected `kink_width` >= 0, got {kink_width}.")
        self._names = tuple(layer_names(module))
        if not self._names:
            raise ValueError("Expected a module with a Linear or convolution layer, got one without any weight matrix.")
        self._reference = _Reference(module)
        self._kink_width = kink_width
        self._reasons: dict[str, str] = {}
        self._activations: dict[str, str] = {}
        # One row a layer whether or not it is seen, so that all processes have the same rows.
        self.add_state("counts", torch.zeros(len(self._names), 3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_fn: LossFn, batch: Any, previous: Mapping[str, Tensor] | None = None) -> None:
        """Count the regimes in one evaluation of a loss.

        Args:
            loss_fn: ``loss_fn(module, batch)`` -> loss; its value is not used.
            batch: Any batch.
            previous: Parameter's name -> its value before the last update (a clone of ``named_parameters()`` or of
                the state dict taken then); where a parameter is missing it counts as not updated.

        Raises:
            ValueError: If no layer was called, the batch is empty, or ``previous`` does not fit the module.
        """
        module = self._reference.module
        old = None if previous is None else _matched(module, previous)
        # Leaves with a graph, for losses that differentiate within.
        parameters: dict[Tensor, Tensor] = {
            p: p.detach().requires_grad_() for p in module.parameters() if p.requires_grad
        }
        counter = RegimeCounter(self._kink_width)
        with Sandbox(module) as sandbox, torch.enable_grad():
            captured = capture(
                sandbox,
                module,
                loss_fn,
                batch,
                parameters=parameters,
                observers=[counter],
                previous=old,
                graph=False,
            )
        # Outside: the sandbox also covers a metric that is an attribute of the module.
        for name, counts in counter.counts(captured).items():
            self.counts[self._names.index(name)] += counts.to(self.counts.device)
        self._reasons |= captured.not_attributed
        self._reasons |= {call.name: call.reason for call in captured.layers if call.reason}
        self._activations |= _described(captured)

    def compute(self) -> dict[str, RegimeShares]:
        """Return layer -> shares, over all processes; only layers of which an entry was counted."""
        shares = {}
        for name, counts in zip(self._names, self.counts, strict=True):
            if int(counts.sum()) > 0:
                of = counts.double() / counts.sum()
                shares[name] = RegimeShares(of[ACTIVATED], of[TRANSITIONING], of[NOT_ACTIVATED])
        return shares

    def reset(self) -> None:
        """Forget all counts."""
        super().reset()
        self._reasons = {}
        self._activations = {}

    @property
    def activations(self) -> dict[str, str]:
        """Layer -> the activation it was judged by in this process, such as ``"relu via batch_norm, add"``."""
        return dict(self._activations)

    @property
    def not_attributed(self) -> dict[str, str]:
        """Layer -> why no entry of it was counted in this process, in words."""
        counted = self.counts.sum(dim=1).tolist()
        unseen = [name for name, n in zip(self._names, counted, strict=True) if n == 0]
        return {name: self._reasons.get(name, "not measured yet") for name in unseen}


def _described(captured: Capture) -> dict[str, str]:
    words: dict[str, dict[str, None]] = {}
    for call in captured.layers:
        if call.activation is not None:
            via = f" via {', '.join(call.activation.via)}" if call.activation.via else ""
            words.setdefault(call.name, {})[f"{call.activation.activation.name}{via}"] = None
    return {name: "; ".join(found) for name, found in words.items()}


def _matched(module: nn.Module, previous: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
    """Return live parameter -> previous value."""
    named = dict(module.named_parameters())
    found: dict[Tensor, Tensor] = {p: previous[name] for name, p in named.items() if name in previous}
    if not found:
        raise ValueError(f"Expected `previous` to name parameters of the module, got {sorted(previous)[:5]}.")
    for name, p in named.items():
        if p in found and found[p].shape != p.shape:
            raise ValueError(f"Expected {name!r} of shape {tuple(p.shape)}, got {tuple(found[p].shape)}.")
    return found
