"""The edges of optimizers that have losses of their own, each over its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.optim import Optimizer

from eos_monitor.curvature.hessian import HessianOperator
from eos_monitor.isolation.twin import trained_parameters
from eos_monitor.limits.thresholds import CriticalCurvature
from eos_monitor.readings.edge_solver import EdgeOperator, Solution, StartVectors, WarmSolver
from eos_monitor.readings.reading import OwnEdge
from eos_monitor.readings.settings import Solver


@dataclass(frozen=True)
class OwnSolution:
    """The edge of the optimizer that is nearest to its own.

    Attributes:
        solution: Its eigenpairs, in the space of all parameters; converged if those of all optimizers are.
        solver: That has found them.
        edges: The edges of all optimizers that have one, the nearest first.
    """

    solution: Solution
    solver: WarmSolver
    edges: tuple[OwnEdge, ...]


class OwnEdges:
    """Solves for the edge of each optimizer, from the Ritz vectors of its own solve before.

    The Hessian is block diagonal, and one solver for all blocks could miss one that has overtaken the others.

    Args:
        settings: How to solve.
        random: Start vectors.
        late: Whether the time for products is up.
    """

    def __init__(self, settings: Solver, random: StartVectors, late: Callable[[], bool]) -> None:
        self._settings = settings
        self._random = random
        self._late = late
        self._solvers: dict[int, WarmSolver] = {}

    def solve(
        self,
        operator: HessianOperator,
        curvature: CriticalCurvature,
        optimizers: Sequence[Optimizer],
        names: Sequence[str],
        reachable: Callable[[EdgeOperator], float],
    ) -> OwnSolution:
        """Return the edges, of at least one optimizer.

        Args:
            operator: The Hessian, a block an optimizer.
            curvature: Critical curvature of all their parameters.
            optimizers: The optimizers.
            names: What they are called.
            reachable: Relative residual that a solve can get to.
        """
        assert curvature.c is not None
        found: list[tuple[OwnEdge, Solution, WarmSolver]] = []
        stop = 0
        for i, optimizer in enumerate(optimizers):
            start = stop
            stop += sum(p.numel() for p in trained_parameters([optimizer]))
            c = torch.full_like(curvature.c, torch.inf)
            c[start:stop] = curvature.c[start:stop]
            if bool(torch.isfinite(c).any()):
                solver = self._solver(i)
                solution = solver.asked(EdgeOperator(operator, replace(curvature, c=c), reachable))
                found.append((OwnEdge(names[i], solution.top, start, stop), solution, solver))
        found.sort(key=lambda one: -one[0].ratio)
        _, nearest, solver = found[0]
        spectra = [solution.spectrum for _, solution, _ in found]
        spectrum = replace(
            nearest.spectrum,
            matvecs=sum(spectrum.matvecs for spectrum in spectra),
            converged=all(spectrum.converged for spectrum in spectra),
        )
        return OwnSolution(replace(nearest, spectrum=spectrum), solver, tuple(edge for edge, _, _ in found))

    def _solver(self, i: int) -> WarmSolver:
        if i not in self._solvers:
            self._solvers[i] = WarmSolver(None, self._settings, self._random, late=self._late)
        return self._solvers[i]
