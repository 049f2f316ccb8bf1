"""Curvature along the step that an optimizer is about to take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.curvature.gradient_graph import flatten
from eos_monitor.curvature.hessian import HessianOperator, SumOverRanks
from eos_monitor.curvature.norms import dot
from eos_monitor.isolation.sandbox import LossFn, Sandbox
from eos_monitor.isolation.twin import as_list, proposed_update, trained_parameters

METHODS = ("product", "forward")
# Rounding of a change of the loss, in units of eps·|L|: at most 2.3 on seven float32 nets of 2 to 12 layers.
_LOSS_ROUNDING = 4.0
# A step whose loss change is known to less than this share says nothing.
_LEAST_RESOLVED = 0.1


def directional_ratio(
    module: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    update: Tensor | None = None,
    method: str = "product",
    batch_size_fn: Callable[[Any], int] | None = None,
    sandbox: Sandbox | None = None,
    sum_over_ranks: SumOverRanks | None = None,
) -> float | None:
    r"""Return the directional ratio: how far the next step overshoots the valley that it sees.

    .. math:: r_\mathrm{dir} = \frac{u^\top H u}{-2\, g^\top u},

    with u the update that the optimizers would make at g, and g, H gradient and Hessian of the mean loss over the
    batches. Below 1/2 the step ends before the lowest point along it, at 1 it ends as high as it began: any optimizer
    in a pure period-2 oscillation has ratio 1. Nothing has to be known of the optimizer.

    This is a gauge of the present state and a lower bound: it weighs the modes by their share of the step, and is blind
    to the edge until an oscillation has built up there (full-batch runs crossed the edge with a ratio of 0.02 to 0.04
    and took 100 steps and more to show it). It is never evidence of stability.

    Args:
        module: Module whose loss is differentiated.
        loss_fn: ``loss_fn(module, batch)`` -> scalar mean loss over the batch.
        batches: Batches, at least one; g and H are those of the mean over all their samples.
        optimizer: One optimizer or several, which then make one step together. None is touched.
        update: Update to use instead of the proposed one, ``(n,)`` in ``param_groups`` order: after gradient clipping,
            say.
        method: ``"product"``, one Hessian-vector product, or ``"forward"``, for what cannot be differentiated twice:
            1 − (L(θ + u) − L(θ)) / gᵀu from two losses, which adds the third derivatives along u and loses
            eps·|L|/|gᵀu| to rounding.
        batch_size_fn: Number of samples in a batch; by default the first dimension of its first tensor.
        sandbox: Sandbox to run in, when the module needs a special one.
        sum_over_ranks: Sum of a tensor over the processes of a data-parallel run, as in ``HessianOperator``.

    Returns:
        The ratio, > 0 where the curvature along the step is; infinite where the loss at its end is not finite (method
        ``"forward"``). None if the step does not descend (gᵀu ≥ 0, as momentum and zero gradients do), or if the change
        of the loss drowns in rounding (method ``"forward"``).

    Raises:
        ValueError: If there is no batch or parameter, ``method`` is unknown, ``update`` has another shape, or some
            groups minimize and others maximize.
        RuntimeError: If the loss or the update is not finite.

    Note:
        Coupled weight decay W (that of SGD and Adam) is part of the loss that the optimizer sees: g and H stand for
        g + Wθ and H + W. Whether the decay of a group is coupled is found by stepping a copy of the optimizer without
        decay. Decoupled decay (AdamW) belongs to no loss and is left out; the oscillation is then around a point of
        nonzero gradient, which makes the ratio inexact where the step is mostly decay. With ``maximize``, L is −L.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> loss = lambda m, x: 0.5 * m(x).square().mean()  # curvature 1, edge at lr 2
        >>> round(directional_ratio(net, loss, [torch.ones(1, 1)], torch.optim.SGD(net.parameters(), lr=1.5)), 6)
        0.75

    References:
        D. S. Kalra et al., 2026, arXiv 2601.16979 (equal to the present over the critical learning rate where the loss
        is quadratic along the step).
    """
    if method not in METHODS:
        raise ValueError(f"Expected `method` to be one of {METHODS}, got {method!r}.")
    ahead = StepAhead(
        module,
        loss_fn,
        batches,
        optimizer,
        update,
        batch_size_fn=batch_size_fn,
        sandbox=sandbox,
        sum_over_ranks=sum_over_ranks,
        keep_graph=method == "product",
    )
    if ahead.slope >= 0.0:
        return None
    with ahead.operator:
        if method == "product":
            return ahead.curvature() / (-2 * ahead.slope)
        change = ahead.change(1.0)
        lost = ahead.resolution > _LEAST_RESOLVED * -ahead.slope
        return None if lost else 1 - change / ahead.slope


class StepAhead:
    """The step that optimizers are about to take, and the loss they see along it.

    Attributes:
        operator: Hessian of the loss without decay.
        optimizers: The optimizers.
        update: The step u, ``(n,)``.
        slope: Derivative along u, at the parameters, of the loss with its coupled weight decay.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        optimizer: Optimizer | Iterable[Optimizer],
        update: Tensor | None = None,
        *,
        batch_size_fn: Callable[[Any], int] | None = None,
        sandbox: Sandbox | None = None,
        sum_over_ranks: SumOverRanks | None = None,
        keep_graph: bool = False,
    ) -> None:
        self.optimizers = as_list(optimizer)
        params = trained_parameters(self.optimizers)
        if len({id(p) for p in params}) < len(params):
            raise ValueError("Expected each parameter in one place, got one in two optimizers or groups.")
        signs = {-1 if group.get("maximize") else 1 for o in self.optimizers for group in o.param_groups}
        if len(signs) > 1:
            raise ValueError("Expected groups that all minimize or all maximize the loss, got both.")
        self._sign = signs.pop() if signs else 1
        self.operator = HessianOperator(
            module,
            loss_fn,
            batches,
            params=params,
            batch_size_fn=batch_size_fn,
            sandbox=sandbox,
            sum_over_ranks=sum_over_ranks,
        )
        gradient = self.operator.gradient(keep_graph=keep_graph)
        theta = flatten(params, params, self.operator.dtype, self.operator.device)
        self._decay = _coupled_decay(self.optimizers, gradient, theta, self._sign)
        self.update = _proposed(self.optimizers, gradient, loss_at=self._loss_at) if update is None else update.detach()
        if self.update.shape != (self.operator.size,):
            raise ValueError(f"Expected `update` of shape ({self.operator.size},), got {tuple(self.update.shape)}.")
        self.update = self.update.to(self.operator.device, self.operator.dtype)
        self._decay_slope = 0.0 if self._decay is None else dot(self._decay * theta, self.update)
        self.slope = self._sign * dot(gradient, self.update) + self._decay_slope
        if not math.isfinite(self.slope):
            raise RuntimeError("Expected a finite update, got NaN or infinity. The optimizer's state overflows.")
        self._eps = max(torch.finfo(p.dtype).eps for p in params)
        self._parameter_rounding = self._eps * float(torch.linalg.vector_norm(gradient * theta))
        self._start: float | None = None

    def _loss_at(self, shift: Tensor) -> tuple[float, Tensor]:
        shift = shift.to(self.operator.dtype)
        return self.operator.evaluate(shift), self.operator.gradient(shift)

    @property
    def start(self) -> float:
        """Loss without decay at the parameters."""
        # Not the loss of the gradient's own pass: some kernels differ where gradients are recorded, and the
        # differences of losses are small.
        if self._start is None:
            self._start = self.operator.evaluate()
        return self._start

    @property
    def resolution(self) -> float:
        """Smallest change of the loss that is not lost in its rounding, or in that of the displaced parameters."""
        return _LOSS_ROUNDING * self._eps * abs(self.start) + self._parameter_rounding

    def curvature(self) -> float:
        """Return uᵀ(H + W)u."""
        return self._sign * dot(self.operator.matvec(self.update), self.update) + self._decay_curvature()

    def change(self, scale: float) -> float:
        """Return how much the loss with its decay rises from θ to θ + scale·u; infinite if it is not finite there."""
        loss = self.operator.evaluate(scale * self.update, finite=False)
        if not math.isfinite(loss):
            return math.inf
        return self._sign * (loss - self.start) + scale * self._decay_slope + 0.5 * scale**2 * self._decay_curvature()

    def _decay_curvature(self) -> float:
        return 0.0 if self._decay is None else dot(self._decay * self.update, self.update)


def _proposed(
    optimizers: Sequence[Optimizer],
    gradient: Tensor,
    *,
    settings: dict[str, Any] | None = None,
    loss_at: Callable[[Tensor], tuple[float, Tensor]] | None = None,
) -> Tensor:
    try:
        return proposed_update(optimizers, gradient, settings=settings, loss_at=loss_at)
    except TypeError as error:
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ValueError(f"Expected a step without a closure, got {names}: {error}. Pass `update`.") from error


def _coupled_decay(optimizers: Sequence[Optimizer], gradient: Tensor, theta: Tensor, sign: int) -> Tensor | None:
    """Return the diagonal of W, ``(n,)``: weight decay that acts as part of the gradient; None if there is none."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decays = [float(group.get("weight_decay", 0.0)) for group in groups]
    if not any(decays):
        return None
    sizes = [sum(p.numel() for p in group["params"] if p.requires_grad) for group in groups]
    diagonal = torch.cat([gradient.new_full((size,), decay) for size, decay in zip(sizes, decays, strict=True)])
    # A step without decay, at the gradient with and without W θ: which of them is the real one?
    update = _proposed(optimizers, gradient)
    coupled = _proposed(optimizers, gradient + sign * diagonal * theta, settings={"weight_decay": 0.0})
    absent = _proposed(optimizers, gradient, settings={"weight_decay": 0.0})
    parts = (torch.split(v, sizes) for v in (update - coupled, update - absent, diagonal))
    for miss_coupled, miss_absent, weights in zip(*parts, strict=True):
        if not float(torch.linalg.vector_norm(miss_coupled)) < 0.5 * float(torch.linalg.vector_norm(miss_absent)):
            weights.zero_()
    return diagonal if bool(diagonal.any()) else None
