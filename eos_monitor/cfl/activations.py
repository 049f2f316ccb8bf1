"""Elementwise activations: their second derivatives, and how many pre-activations are in which regime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eos_monitor.cfl.partition import (
    ACTIVATED,
    NOT_ACTIVATED,
    PARTITIONS,
    TRANSITIONING,
    Elementwise,
    Partition,
    derivatives,
    hill,
    numeric_partition,
)

_SQRT_2PI = math.sqrt(2.0 * math.pi)


@dataclass(frozen=True, eq=False)
class Activation:
    """One elementwise activation as it was called.

    Attributes:
        name: Its name in torch's words; ``"product"`` and ``"composition"`` for functions put together by hand.
        function: The function r itself, of tensors of z's shape.
        parameters: The arguments that it was called with besides z.
        scale: β where r(z) = r₁(βz)/β up to factors, so that borders are in units of 1/β; a number, or a tensor that
            broadcasts against z.
        known: The regimes, where they are tabulated; otherwise the rule is evaluated on a grid.
        second: Closed form of r″; None where it is found by two backward passes.
    """

    name: str
    function: Elementwise
    parameters: Mapping[str, Any] = field(default_factory=dict)
    scale: float | Tensor = 1.0
    known: Partition | None = None
    second: Elementwise | None = None

    @cached_property
    def partition(self) -> Partition:
        """Regimes over the real line, in units of 1/scale.

        Raises:
            ValueError: If the function does not act on single numbers (constants of one value per channel).
        """
        return self.known if self.known is not None else numeric_partition(self.function)

    @property
    def piecewise_linear(self) -> bool:
        """Whether r″ = 0 almost everywhere."""
        return self.second is torch.zeros_like

    def second_derivative(self, z: Tensor) -> Tensor:
        """Return r″(z), detached, of z's shape; 0 at kinks."""
        z = z.detach()
        if self.second is not None:
            return self.second(z)
        with torch.enable_grad():
            return derivatives(self.function, z)[1]

    def regimes(self, z: Tensor, reach: Tensor | float = 0.0) -> Tensor:
        """Return the regime of each entry of z: 0 not activated, 1 transitioning, 2 activated; int64, z's shape.

        Args:
            z: Pre-activations.
            reach: Distance from a kink within which z is transitioning, ≥ 0; a number or a tensor of z's shape.
        """
        z = _wide(z)
        regimes = self._intervals(z)
        regimes[self._near_kinks(z, reach)] = TRANSITIONING
        return regimes

    def counts(self, z: Tensor, reach: Tensor | float = 0.0) -> Tensor:
        """Return how many entries of z are in each regime, ``(3,)`` int64; those that are NaN are in none.

        Args:
            z: Pre-activations.
            reach: See :meth:`regimes`.
        """
        # By comparisons, each a tenth of what sorting every entry into its regime takes.
        z = _wide(z)
        scaled = self._scaled(z)
        numbers = z.numel() - z.isnan().sum()
        none = torch.zeros((), dtype=torch.int64, device=z.device)
        below = [none, *((scaled < border).sum() for border in self.partition.borders)]
        counts = torch.zeros(3, dtype=torch.int64, device=z.device)
        for regime, low, high in zip(self.partition.regimes, below, [*below[1:], numbers], strict=True):
            counts[regime] += high - low
        if self.partition.kinks:
            moved = self._intervals(z, self._near_kinks(z, reach))
            counts -= torch.bincount(moved, minlength=3)
            counts[TRANSITIONING] += len(moved)
        return counts

    def _scaled(self, z: Tensor) -> Tensor:
        return z * (self.scale.detach().to(z.dtype) if isinstance(self.scale, Tensor) else self.scale)

    def _intervals(self, z: Tensor, where: Tensor | None = None) -> Tensor:
        """Return the regimes by the borders alone, of all entries or of some."""
        scaled = self._scaled(z) if where is None else self._scaled(z)[where]
        table = torch.tensor(self.partition.regimes, device=z.device)
        borders = torch.tensor(self.partition.borders, dtype=z.dtype, device=z.device)
        return table[torch.bucketize(scaled.contiguous(), borders, right=True)]

    def _near_kinks(self, z: Tensor, reach: Tensor | float) -> Tensor:
        near = torch.zeros_like(z, dtype=torch.bool)
        for kink in self.partition.kinks:
            near |= (z - kink).abs() <= reach
        return near


def _wide(z: Tensor) -> Tensor:
    z = z.detach()
    return z.to(torch.promote_types(z.dtype, torch.float32))  # borders would be rounded to three digits in bfloat16


def _silu2(beta: float | Tensor) -> Elementwise:
    def second(z: Tensor) -> Tensor:
        s = torch.sigmoid(beta * z)
        return beta * s * (1.0 - s) * (2.0 + beta * z * (1.0 - 2.0 * s))

    return second


def _gelu2(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2.0) / _SQRT_2PI * (2.0 - z.square())


def _tanh2(z: Tensor) -> Tensor:
    t = torch.tanh(z)
    return -2.0 * t * (1.0 - t.square())


def _sigmoid2(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1.0 - s) * (1.0 - 2.0 * s)


def swish(beta: float | Tensor = 1.0) -> Activation:
    """Return z σ(βz), the papers' activation; β may be learned, and one number per channel."""
    beta = beta.detach() if isinstance(beta, Tensor) else float(beta)
    return Activation(
        "silu", lambda z: z * torch.sigmoid(beta * z), {"beta": beta}, beta, PARTITIONS["silu"], _silu2(beta)
    )


def _softplus(beta: float, threshold: float) -> Activation:
    def second(z: Tensor) -> Tensor:
        s = torch.sigmoid(beta * z)
        return torch.where(beta * z > threshold, 0.0, beta * s * (1.0 - s))  # linear above the threshold

    low, high = PARTITIONS["softplus"].borders
    return Activation(
        "softplus",
        lambda z: F.softplus(z, beta, threshold),
        {"beta": beta, "threshold": threshold},
        beta,
        # A threshold below 0 cuts off the top of the hill, and with it what "half of the maximum" is.
        hill(low, min(high, threshold)) if threshold >= 0.0 else None,
        second,
    )


def _exponential(name: str, alpha: float, rate: float, slope: float, function: Elementwise) -> Activation:
    """ELU's family: slope · z above 0, and slope · α(e^(rate·z) − 1) below."""
    # r′ at 0 from both sides, in units of the slope
    left = abs(alpha * rate)
    right = 1.0
    steep = ACTIVATED if right >= max(left, right) / 2.0 else NOT_ACTIVATED

    def second(z: Tensor) -> Tensor:
        return torch.where(z < 0.0, slope * alpha * rate**2 * torch.exp(rate * z.clamp(max=0.0)), 0.0)

    kinks = () if left == right else (0.0,)
    partition = Partition((-math.log(2.0), 0.0), (NOT_ACTIVATED, TRANSITIONING, steep), kinks)
    return Activation(name, function, {"alpha": alpha}, rate, partition, second)


def _selu() -> Activation:
    alpha = 1.6732632423543772
    slope = 1.0507009873554805
    return _exponential("selu", alpha, 1.0, slope, F.selu)


def _linear_pieces(
    name: str, function: Elementwise, kinks: Sequence[float], slopes: Sequence[float], **parameters: Any
) -> Activation:
    """Piecewise linear: ``slopes`` below the first kink, …, above the last."""
    steepest = max(abs(s) for s in slopes)
    regimes = tuple(ACTIVATED if abs(s) >= steepest / 2.0 else NOT_ACTIVATED for s in slopes)
    partition = Partition(tuple(kinks), regimes, tuple(kinks))
    return Activation(name, function, parameters, 1.0, partition, torch.zeros_like)


def _prelu(weight: Tensor) -> Activation | None:
    weight = weight.detach()
    if weight.numel() == 1:
        slope = float(weight)
        return _linear_pieces("prelu", lambda z: F.leaky_relu(z, slope), (0.0,), (slope, 1.0), weight=weight)
    # One slope a channel: as long as all are on one side of the rule, the regimes are those of any of them.
    flat = [float(w) for w in (weight.abs().min(), weight.abs().max())]
    sides = {_linear_pieces("prelu", F.relu, (0.0,), (w, 1.0)).partition for w in flat}
    if len(sides) > 1:
        return None
    return _linear_pieces("prelu", lambda z: F.prelu(z, weight), (0.0,), (flat[1], 1.0), weight=weight)


def _clamp(low: float | None, high: float | None, name: str) -> Activation | None:
    if low is None and high is None:
        return None
    if low is not None and high is not None and low >= high:
        return None
    kinks = [k for k in (low, high) if k is not None]
    slopes = [*([] if low is None else [0.0]), 1.0, *([] if high is None else [0.0])]
    return _linear_pieces(name, lambda z: z.clamp(low, high), kinks, slopes, min=low, max=high)


def _leaky(negative_slope: float) -> Activation:
    function = lambda z: F.leaky_relu(z, negative_slope)  # noqa: E731
    return _linear_pieces("leaky_relu", function, (0.0,), (negative_slope, 1.0), negative_slope=negative_slope)


def _gelu(approximate: str) -> Activation:
    tanh = approximate == "tanh"
    return Activation(
        "gelu",
        lambda z: F.gelu(z, approximate=approximate),
        {"approximate": approximate},
        1.0,
        PARTITIONS["gelu_tanh" if tanh else "gelu"],
        None if tanh else _gelu2,
    )


def _threshold(threshold: float, value: float) -> Activation | None:
    # Where the value differs from the threshold the function itself jumps.
    if value != threshold:
        return None
    return _linear_pieces("threshold", lambda z: F.threshold(z, value, value), (value,), (0.0, 1.0), threshold=value)


# name of the torch function -> (names of its arguments after z with defaults, what to build from them)
_BUILDERS: dict[str, tuple[dict[str, Any], Callable[..., Activation | None]]] = {
    "silu": ({}, swish),
    "gelu": ({"approximate": "none"}, _gelu),
    "mish": ({}, lambda: Activation("mish", F.mish, known=PARTITIONS["mish"])),
    "softplus": ({"beta": 1.0, "threshold": 20.0}, _softplus),
    "tanh": ({}, lambda: Activation("tanh", torch.tanh, known=PARTITIONS["tanh"], second=_tanh2)),
    "sigmoid": ({}, lambda: Activation("sigmoid", torch.sigmoid, known=PARTITIONS["sigmoid"], second=_sigmoid2)),
    "hardswish": ({}, lambda: Activation("hardswish", F.hardswish, known=PARTITIONS["hardswish"])),
    "elu": ({"alpha": 1.0}, lambda alpha: _exponential("elu", alpha, 1.0, 1.0, lambda z: F.elu(z, alpha))),
    "celu": ({"alpha": 1.0}, lambda alpha: _exponential("celu", alpha, 1.0 / alpha, 1.0, lambda z: F.celu(z, alpha))),
    "selu": ({}, _selu),
    "relu": ({}, lambda: _linear_pieces("relu", F.relu, (0.0,), (0.0, 1.0))),
    "relu6": ({}, lambda: _clamp(0.0, 6.0, "relu6")),
    "leaky_relu": ({"negative_slope": 0.01}, _leaky),
    "prelu": ({"weight": None}, _prelu),
    "hardtanh": ({"min_val": -1.0, "max_val": 1.0}, lambda min_val, max_val: _clamp(min_val, max_val, "hardtanh")),
    "clamp": ({"min": None, "max": None}, lambda min, max: _clamp(min, max, "clamp")),
    "clamp_min": ({"min": None}, lambda min: _clamp(min, None, "clamp")),
    "threshold": ({"threshold": 0.0, "value": 0.0}, _threshold),
    "hardsigmoid": ({}, lambda: _linear_pieces("hardsigmoid", F.hardsigmoid, (-3.0, 3.0), (0.0, 1.0, 0.0))),
    **{
        name: ({}, lambda name=name, function=function: Activation(name, function))
        for name, function in {
            "logsigmoid": F.logsigmoid,
            "softsign": F.softsign,
            "tanhshrink": F.tanhshrink,
            "erf": torch.erf,
            "sin": torch.sin,
            "cos": torch.cos,
        }.items()
    },
}
_ALIASES = {"clip": "clamp", "special_expit": "sigmoid", "special_erf": "erf", "log_sigmoid": "logsigmoid"}


def is_activation(name: str) -> bool:
    """Whether a torch function of this name, without trailing underscores, is an elementwise activation."""
    return _ALIASES.get(name, name) in _BUILDERS


def read_activation(name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Activation | None:
    """Describe a call of a torch function; ``args`` and ``kwargs`` are those after z.

    None where it is no elementwise activation, or one whose regimes cannot be told (bounds that are tensors, slopes
    of several channels on both sides of the rule).
    """
    name = _ALIASES.get(name, name)
    if name not in _BUILDERS:
        return None
    expected, build = _BUILDERS[name]
    given = {**expected, **dict(zip(expected, args, strict=False))}
    given.update({key: value for key, value in (kwargs or {}).items() if key in expected})
    if name != "prelu" and any(isinstance(value, Tensor) for value in given.values()):
        return None
    return build(**given)
