"""Curvature that single mini-batches have along their own gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from eos_monitor.curvature.finite_differences import FiniteDifferenceStep
from eos_monitor.curvature.hessian import HessianOperator, SumOverRanks
from eos_monitor.curvature.norms import length_of
from eos_monitor.isolation.sandbox import LossFn, Sandbox, preserve_rng


@dataclass(frozen=True)
class BatchSharpness:
    """Mean over mini-batches of the curvature along each one's own gradient.

    Attributes:
        value: The mean, in units of curvature; None if every gradient was zero.
        error: Its standard error; None with fewer than two batches.
        low: Lower end of the Student-t interval; None with fewer than two batches.
        high: Upper end.
        batches: Batches in the mean.
        without_gradient: Batches left out because their gradient is zero.
        converged: Whether the relative standard error was met.
    """

    value: float | None
    error: float | None
    low: float | None
    high: float | None
    batches: int
    without_gradient: int
    converged: bool


def batch_sharpness(
    module: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    params: Sequence[Tensor] | None = None,
    rtol: float = 0.05,
    min_batches: int = 10,
    max_batches: int = 500,
    confidence: float = 0.95,
    accumulate: int = 1,
    method: str = "auto",
    sandbox: Sandbox | None = None,
    sum_over_ranks: SumOverRanks | None = None,
) -> BatchSharpness:
    r"""Estimate the batch sharpness: the curvature that a mini-batch has along its own gradient, on average.

    .. math:: \mathrm{BS} = \mathbb{E}_B \left[ \frac{g_B^\top H_B\, g_B}{\|g_B\|^2} \right],

    the mean of the ratios, each batch with equal weight. Under plain mini-batch SGD this, and not λ_max(H), settles at
    2/lr (``batch_sharpness_limits``). Batches are drawn until the standard error is ``rtol`` of the mean. One
    Hessian-vector product a batch, one batch's graph in memory at a time.

    This is a gauge of the present state and an indicator good to some 25 % for batches of 4 and more (exact mean-square
    stability on linear regression: lr·BS/2 = 0.76 to 1.06, and 0.34 to 1 with one large eigenvalue). With large batches
    it is a lower bound on λ_max(H), and blind to the edge until an oscillation has built up there. A value below the
    limit is never evidence of stability.

    Args:
        module: Module whose loss is differentiated.
        loss_fn: ``loss_fn(module, batch)`` -> scalar mean loss over the batch.
        batches: Independent random batches of the size used in training. No more are drawn than needed; draws from
            the global generators are undone at the end, so that batches which depend on them repeat in the next call.
        params: Parameters that are trained; by default the module's trainable ones.
        rtol: Relative standard error at which to stop.
        min_batches: Batches to use at least, ≥ 2, if there are so many. Stopping at a chance low in the spread costs
            the interval some of its confidence, the more the fewer they are.
        max_batches: Batches to draw at most.
        confidence: Confidence of the Student-t interval, in (0, 1).
        accumulate: Consecutive batches that make one optimizer step; their means count equally, as optimizers see
            them. An incomplete last window is dropped.
        method: As in ``HessianOperator``.
        sandbox: Sandbox to run in, when the module needs a special one.
        sum_over_ranks: Sum of a tensor over the processes of a data-parallel run: the batch of a step is then the
            union over all, each process's mean counting equally. The estimate ends where the first of them runs out.

    Raises:
        ValueError: If there is no batch (or complete window), or an argument is out of its range.
        RuntimeError: If a loss is not finite or does not depend on the parameters.

    Note:
        Batches whose gradient is exactly zero move nothing and have no direction; they are left out and counted.
        Weight decay is left out, as in the paper.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> batches = [torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[3.0]])]
        >>> found = batch_sharpness(net, lambda m, x: 0.5 * m(x).square().mean(), batches)
        >>> round(found.value, 4), found.batches, found.converged  # (1 + 4 + 9) / 3
        (4.6667, 3, False)

    References:
        A. Andreyev and P. Beneventano, "Edge of Stochastic Stability", 2024, arXiv 2412.20553.
    """
    _check_arguments(rtol, min_batches, max_batches, confidence, accumulate)
    sandbox = sandbox or Sandbox(module)
    ratios: list[float] = []
    drawn = 0
    step: FiniteDifferenceStep | None = None
    # Around everything, and each evaluation restores the generators too: batches are drawn between evaluations, and
    # must not be drawn from the one state that these start from.
    with preserve_rng():
        windows = _windows(batches, accumulate, sum_over_ranks)
        while drawn < max_batches and not _met(ratios, rtol, min_batches):
            window = next(windows, None)
            if window is None:
                break
            operator = HessianOperator(
                module,
                loss_fn,
                window,
                params=params,
                method=method,
                batch_size_fn=lambda batch: 1,
                sandbox=sandbox,
                sum_over_ranks=sum_over_ranks,
                step=step,
            )
            ratio = _rayleigh_quotient(operator)
            step = operator.step
            drawn += 1
            if ratio is not None:
                ratios.append(ratio)
    if drawn == 0:
        raise ValueError(f"Expected at least {accumulate} batch(es), the window of one step, got fewer.")
    return _estimate(ratios, drawn, rtol, min_batches, confidence)


def _rayleigh_quotient(operator: HessianOperator) -> float | None:
    """Return gᵀHg / gᵀg; None if g is zero."""
    with operator:
        gradient = operator.gradient(keep_graph=True)
        length = length_of(gradient)
        if not length > 0.0:
            return None
        direction = gradient / length
        return float(operator.matvec(direction) @ direction)


def _estimate(ratios: Sequence[float], drawn: int, rtol: float, min_batches: int, confidence: float) -> BatchSharpness:
    value, error = _mean_and_error(ratios)
    width = math.inf if error is None else error * float(stats.t.ppf((1 + confidence) / 2, len(ratios) - 1))
    return BatchSharpness(
        value=value,
        error=error,
        low=None if value is None or error is None else value - width,
        high=None if value is None or error is None else value + width,
        batches=len(ratios),
        without_gradient=drawn - len(ratios),
        converged=_met(ratios, rtol, min_batches),
    )


def _windows(batches: Iterable[Any], size: int, sum_over_ranks: SumOverRanks | None) -> Iterator[list[Any]]:
    """Yield the batches of one step after the other, for as long as every process has them."""
    iterator = iter(batches)
    while True:
        failure: Exception | None = None
        window: list[Any] = []
        try:
            window = list(islice(iterator, size))
        except Exception as error:
            failure = error  # raised once the others, who wait in the sum, know
        complete = len(window) == size
        if sum_over_ranks is not None:
            complete = float(sum_over_ranks(torch.tensor([float(not complete)], device="cpu"))) == 0.0
        if failure is not None:
            raise failure
        if not complete:
            return
        yield window


def _mean_and_error(ratios: Sequence[float]) -> tuple[float | None, float | None]:
    n = len(ratios)
    if n == 0:
        return None, None
    mean = math.fsum(ratios) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((ratio - mean) ** 2 for ratio in ratios) / (n - 1) / n)


def _met(ratios: Sequence[float], rtol: float, min_batches: int) -> bool:
    if len(ratios) < min_batches:
        return False
    mean, error = _mean_and_error(ratios)
    return mean is not None and error is not None and error <= rtol * abs(mean)


def _check_arguments(rtol: float, min_batches: int, max_batches: int, confidence: float, accumulate: int) -> None:
    if not rtol >= 0.0:
        raise ValueError(f"Expected `rtol` >= 0, got {rtol}.")
    if not 2 <= min_batches <= max_batches:
        raise ValueError(f"Expected 2 <= `min_batches` <= `max_batches`, got {min_batches} and {max_batches}.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"Expected 0 < `confidence` < 1, got {confidence}.")
    if accumulate < 1:
        raise ValueError(f"Expected `accumulate` >= 1, got {accumulate}.")
