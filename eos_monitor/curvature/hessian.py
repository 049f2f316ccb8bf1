"""Products with the Hessian of a mean loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from eos_monitor.curvature.finite_differences import (
    CheckedProduct,
    FiniteDifferenceStep,
    ProductCheck,
    calibrated_step,
    central_differences,
    check_product,
)
from eos_monitor.curvature.gradient_graph import GradientGraph, flatten
from eos_monitor.curvature.paths import check_parameters, check_paths, trained_but_unreached, unreached
from eos_monitor.curvature.precision import PrecisionWatch, Widened
from eos_monitor.curvature.spread import Moments, Spread, couples_samples, parts_of, spread_of
from eos_monitor.isolation.batches import batch_size, doubt_about_samples, is_time_first
from eos_monitor.isolation.sandbox import LossFn, Sandbox, Stage, check_loss, preserve_rng

METHODS = ("auto", "double-backward", "fd")
SumOverRanks = Callable[[Tensor], Tensor]

_OTHER_DRAWS = 8  # of random numbers, in which a parameter is looked for


class HessianOperator:
    r"""Hessian of the mean loss over some batches, as an operator on flat vectors.

    .. math:: H = \nabla^2_\theta \, \frac{1}{N} \sum_b n_b \, \ell_b(\theta),

    where :math:`\ell_b` is the mean loss of batch b and :math:`n_b` its number of samples. Double backward: with one
    batch the gradient's graph is recorded once and kept, with several each product works through them one at a time.
    The module runs in a sandbox: in its present train or eval mode, with its parameters aliased; nothing of it changes.

    Curvature that sits in the kinks of ReLU-like functions is invisible to automatic differentiation.

    Args:
        module: Module whose loss is differentiated.
        loss_fn: ``loss_fn(module, batch)`` -> scalar mean loss over the batch.
        batches: Batches of the probe, of any structure; worked through as they are, never merged.
        params: Parameters in the order of the vectors; by default the module's trainable ones.
        method: ``"double-backward"`` (also ``"auto"``), or ``"fd"``: central finite differences of the gradient, for
            what cannot be differentiated twice; two gradients a product, inexact where the loss has kinks.
        batch_size_fn: Number of samples in a batch; by default the first dimension of its first tensor.
        sandbox: Sandbox to run in, when the module needs a special one.
        sum_over_ranks: Elementwise sum of a flat tensor over the processes of a data-parallel run, each of which holds
            batches of its own; H is then that of the mean loss over all of them, and where a batch fails on one process
            the call fails on all. Every process has to make the same calls.
        step: Step of method ``"fd"``, from an earlier operator; by default calibrated at the first product.
        complete: Whether a loss without a path, in any batch, to parameters that have a gradient is an error.

    Raises:
        ValueError: If there is no batch, no trainable parameter, or the method is unknown.
        TypeError: If a parameter is not real floating point.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> hessian = HessianOperator(net, lambda m, batch: m(batch).square().mean(), [x])
        >>> hessian.matvec(torch.ones(2))  # 2/N XᵀX
        tensor([1., 9.])
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        params: Sequence[Tensor] | None = None,
        method: str = "auto",
        batch_size_fn: Callable[[Any], int] | None = None,
        sandbox: Sandbox | None = None,
        sum_over_ranks: SumOverRanks | None = None,
        step: FiniteDifferenceStep | None = None,
        complete: bool = False,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"Expected `method` to be one of {METHODS}, got {method!r}.")
        self.method = "fd" if method == "fd" else "double-backward"
        self._loss_fn = loss_fn
        self._sandbox = sandbox or Sandbox(module, alone=sum_over_ranks is None)
        self._sum_over_ranks = sum_over_ranks
        with preserve_rng():  # a DataLoader's iterator draws its seed from the global generator
            self._batches = list(batches)
        if not self._batches:
            raise ValueError("Expected at least one batch, got none.")
        self._batch_size = batch_size_fn or batch_size
        self._coupled = couples_samples(module)
        self._time_first = batch_size_fn is None and is_time_first(module)
        self._samples = [self._batch_size(batch) for batch in self._batches]
        self.doubt = None if batch_size_fn else doubt_about_samples(module, self._batches, self._samples)
        if min(self._samples) < 1:
            raise ValueError(f"Expected batches of at least one sample, got sizes {self._samples}.")
        trainable = (p for p in module.parameters() if p.requires_grad)
        self._params: list[Tensor] = list(params if params is not None else trainable)
        check_parameters(self._params)
        self.size = sum(p.numel() for p in self._params)
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in self._params) else torch.float32
        self.device = self._params[0].device
        self.loss: float | None = None
        self.unused: float | None = None
        self._graph: GradientGraph | None = None
        self._stage: Stage = []  # of the kept graph
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._paths_are_seen = False
        self._complete = complete
        self._reached = [True] * len(self._params)  # by the loss at the last product
        self._gradients = [p.grad if complete else None for p in self._params]  # training's: a loss may set others
        self.step = step
        self.watch = PrecisionWatch()
        self._entered = False

    @property
    def samples(self) -> int:
        """Samples in the batches of this process."""
        return sum(self._samples)

    def __enter__(self) -> HessianOperator:
        """Stay in the sandbox until exit, instead of for each product."""
        self._sandbox.__enter__()
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the sandbox and free the kept graph."""
        self._entered = False
        self._graph = None
        self._stage = []
        self._sandbox.__exit__(kind, error, trace)

    def matvec(self, v: Tensor) -> Tensor:
        """Return ``H v`` for ``v`` of shape ``(n,)``.

        Raises:
            ValueError: If ``v`` has another shape.
            RuntimeError: If the loss is not finite, not a scalar tensor, or does not depend on the parameters.
        """
        if v.shape != (self.size,):
            raise ValueError(f"Expected a vector of shape ({self.size},), got {tuple(v.shape)}.")
        if self.method == "fd":
            return self._finite_difference(v)
        parts = self._split(v)
        losses = [0.0] * len(self._batches)
        unused = [1.0] * len(self._batches)
        reached: list[list[bool]] = []

        def product(i: int) -> Tensor:
            keep = len(self._batches) == 1
            graph = self._kept() or self._record(self._batches[i], i, keep=keep)
            losses[i] = graph.loss
            unused[i] = graph.unused
            reached.append(graph.reached)
            if self._complete and len(reached) == len(self._batches):
                self._check_reached(reached)
            return graph.product(parts, keep=keep)

        mean = self._mean(product, self.size, self.dtype)
        self.unused = min(unused)
        self._reached = [any(one) for one in zip(*reached, strict=True)]
        # The loss of this process alone is no mean over the others.
        if self._sum_over_ranks is None:
            self.loss = sum(n * loss for n, loss in zip(self._samples, losses, strict=True)) / self.samples
        return mean

    def evaluate(self, shift: Tensor | None = None, *, finite: bool = True) -> float:
        """Return the mean loss over the batches, at the parameters plus ``shift``.

        Args:
            shift: Displacement of the parameters, ``(n,)``.
            finite: Whether a loss that is not finite is an error.
        """
        points = self._points(shift)

        def loss(i: int) -> Tensor:
            # Recorded, though no graph is needed: a loss may differentiate inside.
            return self._evaluate(self._batches[i], points, i, finite=finite, constant=True).detach().reshape(1)

        return float(self._mean(loss, 1, torch.float64))

    def gradient(
        self, shift: Tensor | None = None, *, dtype: torch.dtype | None = None, keep_graph: bool = False
    ) -> Tensor:
        """Return the gradient of the mean loss, ``(n,)``, at the parameters plus ``shift``.

        Args:
            shift: Displacement of the parameters, ``(n,)``.
            dtype: Evaluate in this precision instead of the module's own.
            keep_graph: Record the graph of a single batch for the products to come (at no displacement).
        """
        points = [p.requires_grad_() for p in self._points(shift, dtype)]

        def gradient(i: int) -> Tensor:
            if keep_graph and len(self._batches) == 1 and self.method == "double-backward":
                return self._record(self._batches[i], i, keep=True).gradient()
            loss = self._evaluate(self._batches[i], points, i, dtype)
            self._check_paths(loss, points)
            gradients = torch.autograd.grad(loss, points, allow_unused=True)
            return flatten(gradients, points, dtype or self.dtype, self.device)

        return self._mean(gradient, self.size, dtype or self.dtype)

    def spread(self, u: Tensor, scale: Tensor, least: int) -> Spread | None:
        """Return how much ``S H_b S u`` varies over the probe, with S = diag(scale); None if it has too few parts.

        Its parts b are the batches, or equal slices where they are fewer than ``least``. Costs a product, rebuilt.

        Args:
            u: Unit vector, ``(n,)``.
            scale: Diagonal of S, ``(n,)`` or ``(1,)``.
            least: Parts that are needed, on each process.
        """
        parts, sliced, enough = parts_of(self._batches, least, coupled=self._coupled)
        weights = [self._batch_size(part) for part in parts]
        # Slices of time are no samples.
        enough = enough and (not sliced or (sum(weights) == self.samples and not self._time_first))
        # Whole batches add up to the whole by themselves. With several processes all have to take the product.
        whole = None
        if sliced or self._sum_over_ranks is not None:
            whole = float((scale * self.matvec(scale * u)).double() @ u.double())
        direction = self._split(scale * u)

        def moments() -> Tensor:
            found = Moments(u, self.device)
            for i, part in enumerate(parts if enough else ()):
                found.add(scale * self._record(part, i).product(direction, keep=False), weights[i])
            if not enough:
                found.give_up()
            return found.total

        return spread_of(self._sum(moments, self.size + 7, torch.float64), whole)

    def check(self, v: Tensor) -> ProductCheck:
        """Compare ``H v`` with central finite differences; double backward can be wrong without an error.

        In double precision where the loss can be evaluated in it (four gradients), else in float32, where a mismatch
        that the kinks of the loss explain is accepted (six gradients).
        """
        direction = v / torch.linalg.vector_norm(v)
        checked = CheckedProduct(
            product=self.matvec(direction),
            gradient=self.gradient,
            in_double=self.matvec_in_double,
            rounding=8 * max(torch.finfo(p.dtype).eps for p in self._params),  # bfloat16 parameters: 0.06
            error=None if self.method != "fd" else self.step.error if self.step is not None else 0.0,
            computed=self.precision,
        )
        return check_product(checked, direction)

    def reached_part(self, v: Tensor) -> Tensor:
        """Return ``v``, ``(n,)``, without parameters that the last product did not reach in any batch: they rest."""
        flags = torch.tensor(self._reached, dtype=v.dtype, device=self.device)
        flags = self._sum(lambda: flags, len(flags), v.dtype) if self._sum_over_ranks else flags
        return v * (flags > 0).repeat_interleave(torch.tensor([p.numel() for p in self._params], device=self.device))

    def precision(self) -> torch.dtype:
        """Return the least precision that the loss computes in."""
        return self.watch.of(self.evaluate)

    def is_short(self) -> bool:
        """Whether the loss computes, on some process, in a type that is shorter than float32."""
        short = float(torch.finfo(self.precision()).bits < 32)
        return float(self._sum(lambda: torch.full((1,), short, device=self.device), 1, self.dtype)) > 0.0

    def matvec_in_double(self, v: Tensor) -> Tensor:
        """Return ``H v``, computed in double precision throughout."""
        parts = self._split(v, torch.float64)

        def product(i: int) -> Tensor:
            aliases = [p.detach().double().requires_grad_() for p in self._params]
            loss = self._evaluate(self._batches[i], aliases, i, torch.float64)
            return GradientGraph(loss, aliases, self._params, torch.float64, self.device).product(parts, keep=False)

        return self._mean(product, self.size, torch.float64)

    def calibrate(self, v: Tensor) -> FiniteDifferenceStep:
        """Choose the step of method ``"fd"`` along ``v``, for all products to come."""
        self.step = calibrated_step(self.gradient, v / torch.linalg.vector_norm(v), self.dtype)
        return self.step

    def _finite_difference(self, v: Tensor) -> Tensor:
        length = float(torch.linalg.vector_norm(v))
        if length == 0.0:
            return torch.zeros_like(v)
        direction = v / length
        step = self.step or self.calibrate(direction)
        (difference,) = central_differences(self.gradient, direction, (step.size,))
        return length * difference

    def _mean(self, term: Callable[[int], Tensor], size: int, dtype: torch.dtype) -> Tensor:
        """Return the mean of ``term(batch)`` over the batches of all processes, weighted by their samples."""
        if self._sum_over_ranks is None and len(self._batches) == 1:
            with self._inside():
                return term(0)

        def weighted() -> Tensor:
            total = torch.zeros(size + 1, dtype=dtype, device=self.device)
            total[size] = self.samples
            for i, samples in enumerate(self._samples):
                total[:size] += samples * term(i)
            return total

        total = self._sum(weighted, size + 1, dtype)
        return total[:size] / total[size]

    def _sum(self, local: Callable[[], Tensor], size: int, dtype: torch.dtype) -> Tensor:
        """Return the sum of ``local()`` over the processes; where it fails on one, fail on all."""
        if self._sum_over_ranks is None:
            with self._inside():
                return local()
        total = torch.zeros(size + 1, dtype=dtype, device=self.device)
        failure = "'a failure on another one'"
        try:
            with self._inside():
                total[:size] = local()
        except Exception as error:
            # The others wait in the sum: meet them there with empty hands, and fail together. The error itself is not
            # kept: its traceback holds this frame, and with it every tensor of the reading.
            failure = repr(error)
            total.zero_()[-1] = 1.0
        total = self._sum_over_ranks(total)
        if float(total[-1]) > 0.0:
            raise RuntimeError(f"Expected a loss on every process, got {failure}.")
        return total[:size]

    def _inside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._entered else self._sandbox

    def _points(self, shift: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor]:
        points = [p.detach() if dtype is None else p.detach().to(dtype) for p in self._params]
        if shift is None:
            return points
        return [p + part for p, part in zip(points, self._split(shift, dtype), strict=True)]

    def _evaluate(
        self,
        batch: Any,
        points: list[Tensor],
        stream: int,
        dtype: torch.dtype | None = None,
        *,
        finite: bool = True,
        constant: bool = False,
    ) -> Tensor:
        parameters = dict(zip(self._params, points, strict=True))
        with Widened(self.dtype) if dtype == torch.float64 else nullcontext():
            loss = self._sandbox.evaluate(self._loss_fn, batch, parameters, stream=stream, dtype=dtype)
        return check_loss(loss, finite=finite, constant=constant)

    def _record(self, batch: Any, stream: int, *, keep: bool = False) -> GradientGraph:
        aliases = [p.detach().requires_grad_() for p in self._params]
        with self.watch.once():
            loss = self._evaluate(batch, aliases, stream)
        self._check_paths(loss, aliases)
        graph = GradientGraph(loss, aliases, self._params, self.dtype, self.device)
        if keep:
            self._graph = graph
            self._stage = self._sandbox.stage()
        return graph

    def _kept(self) -> GradientGraph | None:
        """Return the kept graph, with the module as it was when that was recorded."""
        if self._graph is None or self._graph.outdated(self._params):
            return None
        self._sandbox.restage(self._stage)
        return self._graph

    def _check_paths(self, loss: Tensor, aliases: list[Tensor]) -> None:
        if not self._paths_are_seen:
            check_paths(loss, aliases, self._params, self._names)
            self._paths_are_seen = True

    def _check_reached(self, reached: list[list[bool]]) -> None:
        """Refuse a loss without a path, in any batch, to parameters that training gives a gradient."""
        found = [any(one) for one in zip(*reached, strict=True)]
        if all(found):
            return
        stage = self._sandbox.stage()
        # Layers that are dropped at random are reached in another draw.
        draws = (self._record(self._batches[0], len(self._batches) + draw).reached for draw in range(_OTHER_DRAWS))
        missing = trained_but_unreached(found, self._params, self._gradients, draws)
        self._sandbox.restage(stage)
        if missing:
            why = "training gives them a gradient, and the loss that is measured does not"
            raise unreached(missing, len(self._params), self._names, why)

    def _split(self, v: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        parts = torch.split(v.detach(), [p.numel() for p in self._params])
        return [x.view(p.shape).to(p.device, dtype or p.dtype) for x, p in zip(parts, self._params, strict=True)]
