"""A warm reading against what other libraries do at their defaults, at the same points of the same trajectories."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from statistics import mean, median

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from eos_monitor.curvature.hessian import HessianOperator
from eos_monitor.curvature.lanczos import lanczos
from eos_monitor.readings.gauge import Gauge
from tests.benchmarks.clock import cpu_seconds, timed
from tests.benchmarks.problems import CASES, Problem
from tests.benchmarks.tables import Progress, Table

_SPACING = 10
_BEFORE = 2  # readings before the first that is timed
_POINTS = 2
_ACCURATE = 0.01

Solver = Callable[[Problem, int], float]  # (problem, seed) -> largest eigenvalue


def pyhessian(problem: Problem, seed: int) -> float:
    from pyhessian import hessian

    torch.manual_seed(seed)
    values, _ = hessian(problem.net, problem.criterion, data=problem.batch, cuda=False).eigenvalues()
    return values[0]


def curvlinops(problem: Problem, seed: int) -> float:
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(problem.net, problem.criterion, problem.params, [problem.batch]).to_scipy()
    v0 = np.random.default_rng(seed).standard_normal(problem.size).astype(np.float32)
    return float(eigsh(operator, k=1, which="LA", v0=v0, return_eigenvectors=False)[0])


def hessian_eigenthings(problem: Problem, seed: int) -> float:
    from hessian_eigenthings import HessianOperator, lanczos

    operator = HessianOperator(problem.net, [problem.batch], problem.loss)
    return float(lanczos(operator, seed=seed).eigenvalues.max())


PEERS: dict[str, tuple[str, Solver]] = {
    "PyHessian": ("pyhessian", pyhessian),
    "curvlinops": ("curvlinops", curvlinops),
    "hessian-eigenthings": ("hessian_eigenthings", hessian_eigenthings),
}


def measure(progress: Progress) -> list[Table]:
    installed = {name: solver for name, (module, solver) in PEERS.items() if find_spec(module)}
    points = [(case, label, steps) for case in CASES for label, steps in (("middle", case.middle), ("edge", case.edge))]
    rows = [
        [f"{case.name}, {label}", *_row(case.start(), steps, installed)] for case, label, steps in progress.over(points)
    ]
    head = ["point", "edge ratio", "warm reading", "first reading, unchecked", *installed, "fastest within 1 % / warm"]
    return [Table("peers", head, rows)]


def _row(problem: Problem, steps: int, installed: dict[str, Solver]) -> list[str]:
    """Costs in forward and backward passes, the mean over some steps of the trajectory; the largest error beside."""
    one_pass = problem.forward_backward()
    one_pass()
    gauge = Gauge()
    problem.train(max(0, steps - _BEFORE * _SPACING))
    for _ in range(_BEFORE):
        _reading(gauge, problem)
        problem.train(_SPACING)
    costs: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    ratios = []
    for seed in range(_POINTS):
        truth = problem.true_sharpness()
        ratios.append(truth * problem.lr / 2)
        solvers: dict[str, Solver] = {"warm": lambda problem, _: _reading(gauge, problem), "cold": _cold} | installed
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be differentiated twice
            for name, solver in solvers.items():
                found, seconds = timed(solver, problem, seed)
                problem.optimizer.zero_grad()  # PyHessian leaves its gradients behind
                unit = median(cpu_seconds(one_pass) for _ in range(5))
                costs.setdefault(name, []).append(seconds / unit)
                errors.setdefault(name, []).append(abs(found / truth - 1))
        problem.train(_SPACING)
    passes = {name: mean(values) for name, values in costs.items()}
    accurate = [passes[name] for name in installed if max(errors[name]) <= _ACCURATE]
    cells = [f"{passes[name]:.1f} ({max(errors[name]):.0e})" for name in passes]
    return [f"{mean(ratios):.2f}", *cells, f"{min(accurate) / passes['warm']:.1f}" if accurate else "-"]


def _reading(gauge: Gauge, problem: Problem) -> float:
    optimizers = [problem.optimizer]
    reading = gauge.measure(problem.net, problem.loss, [problem.batch], optimizers, step=0, full_batch=True).reading
    return reading.sharpness or 0.0


def _cold(problem: Problem, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    with HessianOperator(problem.net, problem.loss, [problem.batch]) as operator:
        return float(lanczos(operator, rtol=1e-4, generator=generator).eigenvalues[0])
