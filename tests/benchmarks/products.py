"""What one Hessian-vector product costs, in forward and backward passes."""

from __future__ import annotations

import torch

from eos_monitor.curvature.hessian import HessianOperator
from tests.benchmarks.clock import cpu_seconds, interleaved
from tests.benchmarks.problems import CASES, Problem
from tests.benchmarks.tables import Progress, Table

_ROUNDS = 21
_PIECES = 8


def measure(progress: Progress) -> list[Table]:
    rows = []
    for case in progress.over(CASES):
        problem = case.start()
        problem.train(case.middle)
        rows.append([case.name, f"{problem.size:,}", len(problem.batch[0]), *_costs(problem)])
    head = ["net", "parameters", "samples", "graph, once", "product, one batch", f"product, {_PIECES} batches"]
    return [Table("products", head, rows)]


def _costs(problem: Problem) -> list[str]:
    v = direction(problem)
    one_pass = problem.forward_backward()

    def fresh() -> object:
        return HessianOperator(problem.net, problem.loss, [problem.batch]).matvec(v)

    parts = HessianOperator(problem.net, problem.loss, problem.pieces(_PIECES))
    cold = interleaved({"pass": one_pass, "first": fresh, "rebuilt": lambda: parts.matvec(v)}, _ROUNDS)
    with HessianOperator(problem.net, problem.loss, [problem.batch]) as whole:
        kept = interleaved({"pass": one_pass, "product": lambda: whole.matvec(v)}, _ROUNDS)
    product = kept["product"] / kept["pass"]
    ratios = [cold["first"] / cold["pass"] - product, product, cold["rebuilt"] / cold["pass"]]
    return [f"{ratio:.2f}" for ratio in ratios]


def engine_and_build(problem: Problem) -> tuple[float, float]:
    """Return the CPU time of a product on a kept graph, and of recording that graph, at the present parameters."""
    v = direction(problem)
    with HessianOperator(problem.net, problem.loss, [problem.batch]) as operator:
        first = cpu_seconds(lambda: operator.matvec(v))
        engine = cpu_seconds(lambda: [operator.matvec(v) for _ in range(3)]) / 3
    return engine, first - engine


def direction(problem: Problem) -> torch.Tensor:
    return torch.randn(problem.size, generator=torch.Generator().manual_seed(0))
