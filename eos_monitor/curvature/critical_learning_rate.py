"""The learning rate at which the next step would no longer lower the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.curvature.directional import StepAhead
from eos_monitor.curvature.hessian import SumOverRanks
from eos_monitor.isolation.sandbox import LossFn, Sandbox

_GROWTH = 4.0  # farthest that the search goes beyond what it has seen
_VISIBLE = 4.0  # a first-order change below so many resolutions is no descent that could be seen


@dataclass(frozen=True)
class CriticalLearningRate:
    """Learning rate at which the loss along the next step stops being lower than it is now.

    Attributes:
        scale: Factor on all learning rates; None if the step does not descend, no increase was met, or none could be
            told from rounding.
        lr: The critical learning rate of every group: ``scale`` times the present one.
        ratio: ``1 / scale``: the present over the critical learning rate.
        error: Relative error of ``scale``: half the bracket, or rounding.
        low: Largest factor known to lower the loss; 0 if none is (the step does not descend).
        high: Smallest factor known to raise it, or not to give a finite one; infinite if none was met.
        forwards: Losses evaluated over all batches.
        gradients: Gradients evaluated over all batches.
        converged: Whether ``error`` is within the tolerance.
    """

    scale: float | None
    lr: tuple[float, ...] | None
    ratio: float | None
    error: float | None
    low: float
    high: float
    forwards: int
    gradients: int
    converged: bool


def critical_learning_rate(
    module: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    update: Tensor | None = None,
    start: float | None = None,
    rtol: float = 0.02,
    max_forwards: int = 20,
    batch_size_fn: Callable[[Any], int] | None = None,
    sandbox: Sandbox | None = None,
    sum_over_ranks: SumOverRanks | None = None,
) -> CriticalLearningRate:
    r"""Find the critical learning rate by forward passes alone.

    .. math:: s_c = \min \{ s > 0 : L(\theta + s u) > L(\theta) \},

    with u the update that the optimizers would make now on the mean gradient of the batches: all groups together, each
    at its present learning rate, so that :math:`s_c\,` is the factor on all of them. Where the loss is quadratic along
    u, :math:`1/s_c` is the ``directional_ratio``.

    One gradient gives u and the slope; then (L(θ + s u) − L(θ)) / s is bracketed and its root found by secants (it is a
    straight line where the loss is a parabola: 3 to 9 passes at 2 % from a start anywhere within 10³ of the answer).
    Every pass sees the same random numbers. A loss that is not finite counts as an increase. The search grows by
    factors of 4, so that a crossing within such a gap, with a loss that falls again behind it, is missed.

    This is a gauge of the present state and a lower bound on the curvature: 2/(lr·s_c) ≤ λ_max(P⁻¹H), with equality
    only if the step lies in the top mode. It is blind to the edge until an oscillation has built up there (full-batch
    runs crossed the edge with a ratio of 0.02 to 0.04 and took 100 steps and more to show it). A large critical
    learning rate is never evidence of stability.

    Args:
        module: Module whose loss is evaluated.
        loss_fn: ``loss_fn(module, batch)`` -> scalar mean loss over the batch.
        batches: Batches, at least one; the loss is the mean over all their samples.
        optimizer: One optimizer or several, which then make one step together. None is touched.
        update: Update to use instead of the proposed one, ``(n,)`` in ``param_groups`` order.
        start: First factor to try, > 0: the ``scale`` found before; 1 by default.
        rtol: Relative accuracy of the factor, in (0, 1).
        max_forwards: Most losses to evaluate, ≥ 3.
        batch_size_fn: Number of samples in a batch; by default the first dimension of its first tensor.
        sandbox: Sandbox to run in, when the module needs a special one.
        sum_over_ranks: Sum of a tensor over the processes of a data-parallel run, as in ``HessianOperator``.

    Raises:
        ValueError: If an argument is out of its range; otherwise as ``directional_ratio``.
        RuntimeError: If the loss at the parameters, or the update, is not finite.

    Note:
        Coupled weight decay counts as part of the loss, as in ``directional_ratio``. The update is taken as linear in
        the learning rate: all optimizers of torch but Adafactor (at large ones), ASGD, Rprop and LBFGS.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> loss = lambda m, x: 0.5 * m(x).square().mean()  # curvature 1, edge at lr 2
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> found = critical_learning_rate(net, loss, [torch.ones(1, 1)], sgd)
        >>> round(found.lr[0], 3), found.converged
        (2.0, True)

    References:
        D. S. Kalra et al., 2026, arXiv 2601.16979 (definition; there by doubling and bisection).
    """
    begin = 1.0 if start is None else float(start)
    if not 0.0 < begin < math.inf:
        raise ValueError(f"Expected a finite `start` > 0, got {start}.")
    if not 0.0 < rtol < 1.0:
        raise ValueError(f"Expected 0 < `rtol` < 1, got {rtol}.")
    if max_forwards < 3:
        raise ValueError(f"Expected `max_forwards` >= 3, got {max_forwards}.")
    ahead = StepAhead(
        module,
        loss_fn,
        batches,
        optimizer,
        update,
        batch_size_fn=batch_size_fn,
        sandbox=sandbox,
        sum_over_ranks=sum_over_ranks,
    )
    if ahead.slope >= 0.0:
        return CriticalLearningRate(None, None, None, None, 0.0, math.inf, 0, 1, converged=False)
    with ahead.operator:
        bracket = _Bracket(ahead.slope, ahead.resolution, rtol)
        forwards = 1  # the loss at the parameters
        s = begin
        while forwards < max_forwards and not bracket.done:
            bracket.add(s, ahead.change(s))
            forwards += 1
            s = bracket.next()
    scale, error = bracket.estimate()
    lrs = [float(group["lr"]) for o in ahead.optimizers for group in o.param_groups if group.get("lr") is not None]
    return CriticalLearningRate(
        scale=scale,
        lr=None if scale is None else tuple(scale * lr for lr in lrs),
        ratio=None if scale is None else 1 / scale,
        error=error,
        low=bracket.low,
        high=bracket.high,
        forwards=forwards,
        gradients=1,
        converged=error is not None and error <= rtol,
    )


@dataclass
class _Bracket:
    """The root of ψ(s) = (L(θ + s u) − L(θ)) / s between ``low`` and ``high``; ψ(0) is the slope, below 0."""

    slope: float
    resolution: float
    rtol: float
    low: float = 0.0
    high: float = math.inf
    _points: list[tuple[float, float]] = field(default_factory=list)  # (ψ, s), finite and resolved
    _widths: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._points.append((self.slope, 0.0))

    @property
    def blur(self) -> float:
        """Distance from the root within which the sign of the change is rounding, for a parabola."""
        return self.resolution / -self.slope

    @property
    def done(self) -> bool:
        return self.high < math.inf and self.high - self.low <= max(self.rtol * self.high, 2 * self.blur)

    def add(self, s: float, change: float) -> None:
        if abs(change) > self.resolution:  # also infinite
            if change < 0.0:
                self.low = s
            else:
                self.high = s
        elif s <= _VISIBLE * self.blur:  # too short to see where it goes
            self.low = s
            return
        else:  # back at the height of the start
            self.low = max(self.low, s - self.blur)
            self.high = min(self.high, s + self.blur)
        if math.isfinite(change):
            self._points.append((change / s, s))
        self._widths.append(self.high - self.low)

    def next(self) -> float:
        """Return the factor to try next: a little off the expected root, on the side that is far."""
        root = self._secant_root()
        off = 0.45 * self.rtol
        if self.high == math.inf:
            cap = _GROWTH * self.low
            return root * (1 + off) if root is not None and self.low < root * (1 + off) < cap else cap
        stalled = len(self._widths) > 2 and self._widths[-1] > 0.5 * self._widths[-3]
        if root is not None and self.low < root < self.high and not stalled:
            if self.high > root * (1 + 2 * off):
                return root * (1 + off)
            if self.low < root * (1 - 2 * off):
                return root * (1 - off)
        return math.sqrt(self.low * self.high) if self.low > 0.0 else self.high / _GROWTH

    def estimate(self) -> tuple[float | None, float | None]:
        """Return the factor and its relative error; None where there is none."""
        if self.high == math.inf:
            return None, None
        root = self._secant_root()
        scale = root if root is not None and self.low <= root <= self.high else (self.low + self.high) / 2
        error = max(scale - self.low, self.high - scale, self.blur) / scale
        # Only an infinite loss was met, or only rounding.
        return (scale, error) if error < 1.0 else (None, None)

    def _secant_root(self) -> float | None:
        """Return the root of the line through the two points of least |ψ|; None if it is level."""
        if len(self._points) < 2:
            return None
        (a, s), (b, t) = sorted(self._points, key=lambda point: abs(point[0]))[:2]
        return s - a * (t - s) / (b - a) if a != b else None
