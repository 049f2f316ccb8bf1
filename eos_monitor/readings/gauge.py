"""The instrument: readings one after the other, each starting from the one before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.curvature.finite_differences import FiniteDifferenceStep
from eos_monitor.curvature.hessian import HessianOperator, SumOverRanks
from eos_monitor.curvature.lanczos import Spectrum
from eos_monitor.isolation.sandbox import LossFn, Sandbox, preserve_rng
from eos_monitor.isolation.twin import as_list, trained_parameters
from eos_monitor.limits.edge_scale import edge_scale, shortened
from eos_monitor.limits.thresholds import CriticalCurvature, critical_curvature, learning_rates
from eos_monitor.readings.edge_solver import AUDIT_EVERY, EdgeOperator, StartVectors, WarmSolver
from eos_monitor.readings.guard import everywhere
from eos_monitor.readings.reading import Measurement, StabilityReading
from eos_monitor.readings.state_gauges import with_state_gauges

_PARTS = 8
_NEAR_EDGE = 0.75
_MOST_MODES = 16


class Gauge:
    """Takes readings one after the other: recycles Ritz vectors, and checks the products at the first.

    Args:
        k: Number of eigenvalues, or ``"edge"`` for all of at least 0.75 (at most 16).
        rtol: Relative residual of a warm solve; a cold one is tightened to at most 1e-4.
        max_matvecs: Bound on the products of one solve.
        method: See :class:`HessianOperator`.
        raw_sharpness: Solve for λ_max(H) too where it does not follow from the edge ratio.
        batch_size_fn: See :class:`HessianOperator`.
        seed: Seed of the start vectors.
    """

    def __init__(
        self,
        *,
        k: int | Literal["edge"] = 1,
        rtol: float = 1e-2,
        max_matvecs: int = 64,
        method: str = "auto",
        raw_sharpness: bool = False,
        batch_size_fn: Callable[[Any], int] | None = None,
        seed: int = 0,
    ) -> None:
        least = 1 if k == "edge" else k
        if not isinstance(least, int) or least < 1 or max_matvecs < least:
            raise ValueError(f"Expected 1 <= `k` <= `max_matvecs`, got {k} and {max_matvecs}.")
        if not 0.0 < rtol < 1.0:
            raise ValueError(f"Expected 0 < `rtol` < 1, got {rtol}.")
        self._all_at_edge, self._rtol, self._max_matvecs = k == "edge", rtol, max_matvecs
        self._method, self._raw, self._batch_size_fn = method, raw_sharpness, batch_size_fn
        self._random = StartVectors(seed)
        self._edge_solver = WarmSolver(least, rtol, max_matvecs, self._random)
        self._raw_solver = WarmSolver(1, rtol, max_matvecs, self._random)
        self.modes: Tensor | None = None  # (n, k), of the last reading, in parameter space
        self.check_note: str | None = None
        self.products_are_wrong = False
        self._checked = False
        self._relative_sampling: float | None = None
        self._sampling_note: str | None = None
        self._step: FiniteDifferenceStep | None = None

    def start_from(self, v0: Tensor) -> None:
        """Use ``v0``, ``(n,)`` or ``(n, j)`` in the scaled coordinates C^½ θ, as if an earlier reading had left it."""
        self._edge_solver.block = v0

    def measure(
        self,
        module: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        optimizers: Sequence[Optimizer],
        *,
        step: int,
        full_batch: bool,
        accumulate: int | None = 1,
        sandbox: Sandbox | None = None,
        sum_over_ranks: SumOverRanks | None = None,
    ) -> Measurement:
        """Take one reading at the module's present parameters."""
        began = time.perf_counter()
        with preserve_rng():  # a DataLoader's iterator draws its seed from the global generator
            batches = list(batches)

        def prepare() -> tuple[CriticalCurvature, HessianOperator]:
            curvature = critical_curvature(optimizers)
            return curvature, HessianOperator(
                module,
                loss_fn,
                batches,
                params=curvature.params,
                method=self._method,
                batch_size_fn=self._batch_size_fn,
                sandbox=sandbox,
                sum_over_ranks=sum_over_ranks,
            )

        curvature, operator = everywhere(prepare, sum_over_ranks, "a probe")
        samples = operator.samples
        if sum_over_ranks is not None:
            samples = int(sum_over_ranks(torch.tensor([float(samples)])))
        reading = StabilityReading(
            step=step,
            loss=None,
            lr=learning_rates(optimizers),
            full_batch=full_batch,
            samples=samples,
            method=operator.method,
            ready=curvature.ready,
        )
        mode = None
        operator.step = self._step
        with operator:
            if _can_move(curvature) and curvature.ready and not self.products_are_wrong:
                reading, mode = self._with_edge(reading, operator, curvature, optimizers)
            if self._raw and reading.sharpness is None and not self.products_are_wrong:
                reading = self._with_raw_sharpness(reading, operator, curvature)
            if curvature.without_threshold:  # a product will be taken along the update
                self._check_products(operator, self._random.vector(operator))
            loss = operator.loss if operator.loss is not None else operator.evaluate()
            self._step = operator.step
        reading = replace(reading, loss=loss, notes=self._notes(curvature, operator))
        if curvature.ready and not self.products_are_wrong:
            reading = with_state_gauges(
                reading,
                module,
                loss_fn,
                batches,
                optimizers,
                without_threshold=bool(curvature.without_threshold),
                accumulate=accumulate,
                method=operator.method,
                batch_size_fn=self._batch_size_fn,
                sandbox=sandbox,
                sum_over_ranks=sum_over_ranks,
            )
        return Measurement(replace(reading, seconds=time.perf_counter() - began), curvature, mode)

    def _with_edge(
        self,
        reading: StabilityReading,
        operator: HessianOperator,
        curvature: CriticalCurvature,
        optimizers: Sequence[Optimizer],
    ) -> tuple[StabilityReading, Tensor | None]:
        assert curvature.c is not None
        edge = EdgeOperator(operator, curvature)
        if operator.method == "fd" and operator.step is None:
            operator.step = operator.calibrate(self._random.vector(operator))
        spectrum, matvecs = self._solve_edge(edge)
        top = edge.scale * spectrum.eigenvectors[:, 0]  # the critical mode in parameter space
        self._check_products(operator, top)
        if self.products_are_wrong:
            return replace(reading, matvecs=matvecs), None
        self.modes = edge.scale[:, None] * spectrum.eigenvectors
        eigenvalues = tuple(spectrum.eigenvalues.tolist())
        r, residual = eigenvalues[0], float(spectrum.residuals[0])
        sampling = self._sampling_error(operator, edge, spectrum, reading.full_batch)
        scale_solver = WarmSolver(1, self._rtol, self._max_matvecs, self._random, self._edge_solver.block)

        def solve(there: CriticalCurvature) -> tuple[float, Tensor]:
            edge = EdgeOperator(operator, there)
            again = scale_solver.solve(edge)
            return float(again.eigenvalues[0]), edge.scale * again.eigenvectors[:, 0]

        scale = edge_scale(r, top, curvature, optimizers, solve, self._rtol)
        reading = replace(
            reading,
            edge_ratio=r,
            eigenvalues=eigenvalues,
            error=residual if sampling is None else math.hypot(residual, sampling),
            sampling_error=sampling,
            residual=residual / abs(r) if r else 0.0,
            threshold=curvature.threshold,
            normalized_sharpness=None if curvature.threshold is None else r * curvature.threshold,
            sharpness=_free_sharpness(r, curvature),
            edge_scale=scale,
            edge_lr=None if scale is None else tuple(scale * lr for lr in reading.lr),
            matvecs=matvecs + scale_solver.matvecs,
            converged=spectrum.converged,
        )
        return reading, top

    def _solve_edge(self, edge: EdgeOperator) -> tuple[Spectrum, int]:
        """Solve for the eigenvalues that were asked for; return the products too."""
        solver = self._edge_solver
        spectrum = solver.solve(edge)
        matvecs = spectrum.matvecs
        if not self._all_at_edge:
            return spectrum, matvecs
        while float(spectrum.eigenvalues[-1]) >= _NEAR_EDGE and len(spectrum.eigenvalues) == solver.k < _MOST_MODES:
            solver.k = min(_MOST_MODES, solver.k + 2)
            spectrum = solver.solve(edge)
            matvecs += spectrum.matvecs
        near = max(1, int((spectrum.eigenvalues >= _NEAR_EDGE).sum()))
        solver.k = min(_MOST_MODES, near + 1)  # the next reading sees that it has all of them
        return replace(
            spectrum,
            eigenvalues=spectrum.eigenvalues[:near],
            eigenvectors=spectrum.eigenvectors[:, :near],
            residuals=spectrum.residuals[:near],
        ), matvecs

    def _sampling_error(
        self, operator: HessianOperator, edge: EdgeOperator, spectrum: Spectrum, full_batch: bool
    ) -> float | None:
        """RMS error of the top eigenvalue θ of a sample as an estimate of the whole's; None if the probe has < 8 parts.

        With p_b = A_b u over m parts: the variance of their mean along u, plus the square of the upward bias that comes
        from u fitting the sample, to first order Σ_b ‖p_b − p̄‖²_⊥ / (m (m − 1) θ), the other eigenvalues taken as 0.
        """
        theta = float(spectrum.eigenvalues[0])
        if full_batch:
            return 0.0
        if theta <= 0.0:
            return None
        if self._edge_solver.solves % AUDIT_EVERY == 1:  # the relative error changes slowly
            try:
                spread = operator.spread(spectrum.eigenvectors[:, 0], edge.scale, _PARTS)
            except Exception as error:  # a loss that needs whole batches still has a curvature
                spread = None
                self._sampling_note = f"no sampling error, because the loss cannot be taken on slices: {error}"
            if spread is None:
                self._relative_sampling = None
            else:
                bias = spread.across / (spread.parts * theta)
                self._relative_sampling = math.sqrt(max(0.0, spread.along) / spread.parts + bias**2) / theta
        return None if self._relative_sampling is None else self._relative_sampling * theta

    def _with_raw_sharpness(
        self, reading: StabilityReading, operator: HessianOperator, curvature: CriticalCurvature
    ) -> StabilityReading:
        raw = EdgeOperator(
            operator, replace(curvature, c=torch.ones_like(curvature.l2), l2=torch.zeros_like(curvature.l2))
        )
        spectrum = self._raw_solver.solve(raw)
        self._check_products(operator, spectrum.eigenvectors[:, 0])
        if self.products_are_wrong:
            return reading
        alone = reading.edge_ratio is None
        return replace(
            reading,
            sharpness=float(spectrum.eigenvalues[0]),
            matvecs=reading.matvecs + spectrum.matvecs,
            converged=spectrum.converged and (alone or reading.converged),
        )

    def _check_products(self, operator: HessianOperator, v: Tensor) -> None:
        if self._checked:
            return
        check = operator.check(v)
        self._checked = True
        self.products_are_wrong = not check.passed
        if not check.passed:
            self.check_note = (
                f"Hessian-vector products by {operator.method} differ from finite differences by "
                f"{check.mismatch:.1%}: something in this module cannot be differentiated twice (weight_norm, "
                "once_differentiable and custom backwards are known to). No edge is reported."
                + (" method='fd' does without second derivatives." if operator.method != "fd" else "")
            )
        elif operator.method == "fd" and check.mismatch > 1e-2:
            self.check_note = f"finite differences are inexact here, by {check.mismatch:.1%} (kinks, or rounding)"
        elif check.dtype != torch.float64:
            self.check_note = (
                f"products checked in float32 only (mismatch {check.mismatch:.1%}), because the loss refuses float64"
            )

    def _notes(self, curvature: CriticalCurvature, operator: HessianOperator) -> tuple[str, ...]:
        notes = []
        if curvature.without_threshold:
            rest = "" if curvature.c is None else "; the edge ratio speaks of the other groups"
            notes.append(f"no known threshold for {', '.join(curvature.without_threshold)}{rest}")
        elif curvature.c is not None and not curvature.notes and not _can_move(curvature):
            notes.append("no edge at a learning rate of 0")
        notes += curvature.notes
        if operator.unused:
            notes.append(f"{operator.unused:.0%} of the trained parameters are not used by the loss")
        notes += [note for note in (self.check_note, self._sampling_note) if note]
        return tuple(notes)


def measure_stability(
    module: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    k: int | Literal["edge"] = 1,
    v0: Tensor | None = None,
    rtol: float = 1e-2,
    max_matvecs: int = 64,
    method: str = "auto",
    raw_sharpness: bool = False,
    step: int = 0,
    full_batch: bool = False,
    batch_size_fn: Callable[[Any], int] | None = None,
) -> StabilityReading:
    r"""Measure how far an optimizer is from its full-batch edge of stability, without touching the run.

    .. math:: r = \lambda_{\max}\bigl(C^{-1/2} (H + W) C^{-1/2}\bigr),

    with H the Hessian of the mean loss over ``batches``, C the critical curvature of each coordinate under the
    optimizer's present state and learning rate, and W its coupled weight decay. r = 1 is the full-batch edge.

    Args:
        module: Module to measure, in its present train or eval mode.
        loss_fn: ``loss_fn(module, batch)`` -> scalar mean loss.
        batches: The probe: batches of any structure.
        optimizer: The optimizer in use, or several.
        k: Number of eigenvalues, or ``"edge"`` for all of at least 0.75.
        v0: Start vector ``(n,)`` or block ``(n, j)`` in the scaled coordinates C^½ θ; random when None.
        rtol: Relative residual to reach; without ``v0`` at most 1e-4, because a loose cold stop can sit on the wrong
            eigenvalue.
        max_matvecs: Bound on the Hessian-vector products of one solve.
        method: How to compute the products, see :class:`HessianOperator`.
        raw_sharpness: Solve for λ_max(H) too where it does not follow from the edge ratio, at the cost of a second
            solve.
        step: Number to file the reading under.
        full_batch: Whether ``batches`` are all the data that a step uses.
        batch_size_fn: Samples in a batch; by default the first dimension of its first tensor.

    Raises:
        ValueError: If there is no batch or no trained parameter, or an argument is out of range.
        RuntimeError: If the loss is not a finite scalar that depends on the parameters.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> reading = measure_stability(net, lambda m, b: m(b).square().mean(), [x], sgd)
        >>> round(reading.sharpness, 4), round(reading.edge_ratio, 4)  # λ_max(2/N XᵀX) = 9, lr·λ/2
        (9.0, 0.45)
    """
    gauge = Gauge(
        k=k,
        rtol=rtol,
        max_matvecs=max_matvecs,
        method=method,
        raw_sharpness=raw_sharpness,
        batch_size_fn=batch_size_fn,
    )
    optimizers = as_list(optimizer)
    if v0 is not None:
        n = sum(p.numel() for p in trained_parameters(optimizers))
        if v0.ndim not in (1, 2) or v0.shape[0] != n or v0.numel() == 0:
            raise ValueError(f"Expected `v0` of shape ({n},) or ({n}, j), got {tuple(v0.shape)}.")
        gauge.start_from(v0)
    return gauge.measure(module, loss_fn, batches, optimizers, step=step, full_batch=full_batch).reading


def _can_move(curvature: CriticalCurvature) -> bool:
    if curvature.c is None:
        return False
    least = float(curvature.c.min())
    return not (least < 0.0 or least == math.inf)  # below 0 the decay alone is unstable


def _free_sharpness(r: float, curvature: CriticalCurvature) -> float | None:
    """λ_max(H) = r·c − wd where C and W are multiples of the identity."""
    assert curvature.c is not None
    c, l2 = shortened(curvature.c), shortened(curvature.l2)
    return r * float(c) - float(l2) if len(c) == len(l2) == 1 else None
