"""The instrument that takes readings one after the other."""

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
from eos_monitor.isolation.parted_loss import PartedLoss
from eos_monitor.isolation.sandbox import LossFn, Sandbox, preserve_rng
from eos_monitor.isolation.twin import as_list, trained_parameters
from eos_monitor.limits.edge_scale import edge_scale, shortened
from eos_monitor.limits.thresholds import CriticalCurvature, learning_rates
from eos_monitor.readings.edge_solver import AUDIT_EVERY, EdgeOperator, Solution, StartVectors, WarmSolver
from eos_monitor.readings.own_edges import OwnEdges
from eos_monitor.readings.pause import Pause
from eos_monitor.readings.products import CheckedProducts, check_products
from eos_monitor.readings.reading import Measurement, OwnEdge, StabilityReading
from eos_monitor.readings.rounding import Rounding
from eos_monitor.readings.settings import Solver
from eos_monitor.readings.state_gauges import with_state_gauges
from eos_monitor.readings.subject import Subject
from eos_monitor.readings.uncertainty import SamplingError, sampling_error

_SOLVER = Solver()


class Gauge:
    """Readings one after the other: each starts from the Ritz vectors of the one before, the first checks the products.

    Args:
        solver: How to solve.
        batch_size_fn: Samples in a batch; by default the first dimension of its first tensor.

    Attributes:
        modes: Critical modes of the last reading that has any, ``(n, k)``, in parameter space.
    """

    def __init__(self, solver: Solver = _SOLVER, batch_size_fn: Callable[[Any], int] | None = None) -> None:
        self.modes: Tensor | None = None
        self._settings = solver
        self._batch_size_fn = batch_size_fn
        self._random = StartVectors(solver.seed)
        self._pause = Pause()
        self._edge_solver = WarmSolver(None, solver, self._random, late=self._pause.is_over)
        self._own_edges = OwnEdges(solver, self._random, self._pause.is_over)
        self._raw_solver = WarmSolver(1, solver, self._random, late=self._pause.is_over)
        self._products: CheckedProducts | None = None  # of the first reading that needs any
        self._checked: tuple[int, ...] = ()  # the parameters that they were checked with
        self._rounding = Rounding()
        self._raw_rounding = Rounding()
        self._sampling = SamplingError()
        self._edges = 0  # readings of a sample with a positive edge
        self._step: FiniteDifferenceStep | None = None

    @property
    def products_are_wrong(self) -> bool:
        """Whether the products failed their check, so that no edge is reported any more."""
        return self._products is not None and self._products.wrong

    @property
    def check_note(self) -> str | None:
        """What the check of the products found, in words; None for nothing."""
        return None if self._products is None else self._products.note

    def renew_error(self) -> None:
        """Find the sampling error afresh at the next reading: the probe is another."""
        self._edges = 0
        self._sampling = SamplingError()

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
        pause: float | None = None,
        others: Iterable[Any] = (),
    ) -> Measurement:
        """Take one reading at the module's present parameters, in about ``pause`` seconds if that is given.

        ``others`` are training batches beside the probe, for what needs no solve.
        """
        began = time.perf_counter()
        self._pause.begin(pause, sum_over_ranks)
        with preserve_rng():  # a DataLoader's iterator draws its seed from the global generator
            probe = list(batches)
        subject = Subject(module, loss_fn, probe, optimizers, self._batch_size_fn, sandbox, sum_over_ranks, others)
        curvature, operator = subject.prepare(self._settings.method, self._step)
        trained = tuple(map(id, curvature.params))
        if trained != self._checked:  # thawed layers have never been looked at
            self._checked = trained
            self._products = None
            self._rounding = Rounding()
            self._raw_rounding = Rounding()
        self._rounding.follow(operator)
        self._raw_rounding.follow(operator)
        reading = StabilityReading(
            step=step,
            loss=None,
            lr=learning_rates(optimizers),
            full_batch=full_batch,
            samples=subject.over_ranks(operator.samples),
            method=operator.method,
            ready=curvature.ready,
        )
        mode = None
        own: tuple[OwnEdge, ...] = ()
        with operator:
            if curvature.ready and _can_move(curvature) and not self.products_are_wrong:
                solution, own = self._solve(operator, curvature, subject)
                reading, mode = self._with_edge(reading, solution, curvature, optimizers)
            if self._settings.raw_sharpness and reading.sharpness is None and not self.products_are_wrong:
                reading = self._with_raw_sharpness(reading, operator, curvature)
            if curvature.without_threshold:  # a product will be taken along the update
                v = self._random.vector(operator)
                self._products = self._products or check_products(operator, v)
            loss = operator.loss if operator.loss is not None else operator.evaluate()
            self._step = operator.step
        found = (self.check_note, self._rounding.note, self._sampling.note, operator.doubt, self._cut_note(reading))
        reading = replace(reading, loss=loss, notes=_notes(curvature, operator, reading, _own_note(own), *found))
        if curvature.ready and not self.products_are_wrong:
            without = bool(curvature.without_threshold)
            reading = with_state_gauges(reading, subject, without_threshold=without, accumulate=accumulate)
        return Measurement(replace(reading, seconds=time.perf_counter() - began), curvature, mode, own)

    def _cut_note(self, reading: StabilityReading) -> str | None:
        if reading.converged or reading.matvecs >= self._settings.max_matvecs or not self._pause.is_over():
            return None
        return (
            f"cut off after {reading.matvecs} products, as a reading may hold the run for {self._pause.seconds:.2g} s; "
            "it goes on at the next one"
        )

    def _with_edge(
        self,
        reading: StabilityReading,
        solution: Solution,
        curvature: CriticalCurvature,
        optimizers: Sequence[Optimizer],
    ) -> tuple[StabilityReading, Tensor | None]:
        """Add the edge ratio and what follows from it; return the critical mode too, None if products are wrong."""
        operator = solution.operator.hessian
        mode = solution.mode
        if not solution.spectrum.converged and self._pause.is_over():
            # The rest waits for a reading that is one.
            return _with_numbers(reading, solution, curvature, 0.0, self._sampling.at(solution.top), None, 0), mode
        self._products = self._products or check_products(operator, mode, self._random.vector(operator))
        if self._products.wrong:
            return replace(reading, matvecs=solution.spectrum.matvecs), None
        self.modes = solution.modes
        self._rounding.weigh(solution)
        if not reading.full_batch:
            self._sampling = self._sampling_error(solution)
        sampling = 0.0 if reading.full_batch else self._sampling.at(solution.top)
        scale, matvecs = self._edge_scale(solution, mode, curvature, optimizers)
        rounding = self._rounding.error * abs(solution.top)
        return _with_numbers(reading, solution, curvature, rounding, sampling, scale, matvecs), mode

    def _solve(
        self, operator: HessianOperator, curvature: CriticalCurvature, subject: Subject
    ) -> tuple[Solution, tuple[OwnEdge, ...]]:
        """Return the eigenpairs that were asked for, and the edges of optimizers that have losses of their own."""
        if operator.method == "fd" and operator.step is None:
            operator.calibrate(self._random.vector(operator))
        if isinstance(subject.loss_fn, PartedLoss):
            found = self._own_edges.solve(
                operator, curvature, subject.optimizers, subject.loss_fn.names, self._rounding.reachable
            )
            self._edge_solver = found.solver
            return found.solution, found.edges
        return self._edge_solver.asked(EdgeOperator(operator, curvature, self._rounding.reachable)), ()

    def _sampling_error(self, solution: Solution) -> SamplingError:
        """Return the error of the probe being a sample: the last one, but once in ten solves, as it changes slowly."""
        if solution.top <= 0.0:
            return self._sampling
        self._edges += 1  # not the solves: one reading may take several
        if self._edges % AUDIT_EVERY != 1:
            return self._sampling
        found = sampling_error(solution)
        return replace(found, note=found.note or self._sampling.note)

    def _edge_scale(
        self, solution: Solution, mode: Tensor, curvature: CriticalCurvature, optimizers: Sequence[Optimizer]
    ) -> tuple[float | None, int]:
        """Return the factor on all learning rates that leads to the edge, and the products that it took."""
        solver = WarmSolver(1, self._settings, self._random, self._edge_solver.block, self._pause.is_over)

        cut = False

        def solve(there: CriticalCurvature) -> tuple[float, Tensor]:
            nonlocal cut
            again = solver.solve(EdgeOperator(solution.operator.hessian, there, self._rounding.known))
            cut = cut or (not again.spectrum.converged and self._pause.is_over())
            return again.top, again.mode

        scale = edge_scale(solution.top, mode, curvature, optimizers, solve, self._settings.rtol)
        return None if cut else scale, solver.matvecs

    def _with_raw_sharpness(
        self, reading: StabilityReading, operator: HessianOperator, curvature: CriticalCurvature
    ) -> StabilityReading:
        """Add λ_max(H) from a solve of its own."""
        raw = EdgeOperator(
            operator,
            replace(curvature, c=torch.ones_like(curvature.l2), l2=torch.zeros_like(curvature.l2)),
            self._raw_rounding.reachable,
        )
        spectrum = self._raw_solver.solve(raw).spectrum
        self._products = self._products or check_products(
            operator, spectrum.eigenvectors[:, 0], self._random.vector(operator)
        )
        if self._products.wrong:
            return reading
        alone = reading.edge_ratio is None
        return replace(
            reading,
            sharpness=float(spectrum.eigenvalues[0]),
            matvecs=reading.matvecs + spectrum.matvecs,
            converged=spectrum.converged and (alone or reading.converged),
        )


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
    method: Literal["auto", "double-backward", "fd"] = "auto",
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
    solver = Solver(k=k, rtol=rtol, max_matvecs=max_matvecs, method=method, raw_sharpness=raw_sharpness)
    gauge = Gauge(solver, batch_size_fn)
    optimizers = as_list(optimizer)
    if v0 is not None:
        n = sum(p.numel() for p in trained_parameters(optimizers))
        if v0.ndim not in (1, 2) or v0.shape[0] != n or v0.numel() == 0:
            raise ValueError(f"Expected `v0` of shape ({n},) or ({n}, j), got {tuple(v0.shape)}.")
        gauge.start_from(v0)
    return gauge.measure(module, loss_fn, batches, optimizers, step=step, full_batch=full_batch).reading


def _with_numbers(
    reading: StabilityReading,
    solution: Solution,
    curvature: CriticalCurvature,
    rounding: float,
    sampling: float | None,
    scale: float | None,
    scale_matvecs: int,
) -> StabilityReading:
    """Add what follows from an edge's solution, the errors of rounding and sampling, and the scale and its products."""
    r = solution.top
    spectrum = solution.spectrum
    residual = float(spectrum.residuals[0])
    threshold = curvature.threshold_along(solution.mode)
    return replace(
        reading,
        edge_ratio=r,
        eigenvalues=tuple(spectrum.eigenvalues.tolist()),
        error=math.hypot(max(residual, rounding), solution.open, sampling or 0.0),
        sampling_error=sampling,
        residual=residual / abs(r) if r else 0.0,
        threshold=threshold,
        normalized_sharpness=None if threshold is None else r * threshold,
        sharpness=_free_sharpness(r, curvature),
        edge_scale=scale,
        edge_lr=None if scale is None else tuple(scale * lr for lr in reading.lr),
        matvecs=spectrum.matvecs + scale_matvecs,
        converged=spectrum.converged,
    )


def _notes(
    curvature: CriticalCurvature, operator: HessianOperator, reading: StabilityReading, *found: str | None
) -> tuple[str, ...]:
    """Return what a reader should know of the optimizers and parameters, and what was found of the products."""
    notes = []
    if curvature.without_threshold:
        rest = "" if curvature.c is None else "; the edge ratio speaks of the other groups"
        notes.append(f"no known threshold for {', '.join(curvature.without_threshold)}{rest}")
    elif curvature.threshold is None and reading.threshold is not None:
        known = [threshold for threshold in curvature.thresholds if threshold is not None]
        notes.append(
            f"thresholds of the groups from {min(known):.6g} to {max(known):.6g}: weighted by their share of the mode"
        )
    elif curvature.c is not None and not curvature.notes and not _can_move(curvature):
        notes.append("no edge at a learning rate of 0")
    notes += curvature.notes
    if operator.unused:
        notes.append(f"{operator.unused:.0%} of the trained parameters are not used by the loss")
    notes += [note for note in found if note]
    return tuple(notes)


def _own_note(own: Sequence[OwnEdge]) -> str | None:
    """Return of which optimizer an edge ratio is, and those of the others."""
    if not own:
        return None
    others = "".join(f"; {edge.name}: {edge.ratio:.3g}" for edge in own[1:])
    return f"the edge ratio of {own[0].name}, over its own parameters{others}"


def _can_move(curvature: CriticalCurvature) -> bool:
    """Return whether some coordinate has an edge, and the decay alone is stable in all."""
    if curvature.c is None:
        return False
    least = float(curvature.c.min())
    return not (least < 0.0 or least == math.inf)


def _free_sharpness(r: float, curvature: CriticalCurvature) -> float | None:
    """Return λ_max(H) = r·c − wd where C and W are multiples of the identity; None elsewhere."""
    assert curvature.c is not None
    c = shortened(curvature.c)
    l2 = shortened(curvature.l2)
    return r * float(c) - float(l2) if len(c) == len(l2) == 1 else None
