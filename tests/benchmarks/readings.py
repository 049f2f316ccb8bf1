"""What a reading costs beyond its products, and how many products it takes."""

from __future__ import annotations

from statistics import median

import torch

from eos_monitor.isolation.sandbox import Sandbox
from eos_monitor.readings.gauge import Gauge
from eos_monitor.readings.reading import StabilityReading
from tests.benchmarks.clock import cpu_seconds, interleaved, timed
from tests.benchmarks.problems import CASES, Problem
from tests.benchmarks.products import engine_and_build
from tests.benchmarks.tables import Progress, Table

_READINGS = 12
_SPACING = 10


def measure(progress: Progress) -> list[Table]:
    rows = [_row(case.name, case.start(), case.middle) for case in progress.over(CASES)]
    head = ["net", "first: products", "first: passes", "warm: products", "warm: passes", "warm / (products + graph)"]
    return [Table("readings", head, rows), Table("sandbox", ["net", "evaluation", "in the sandbox"], [_sandbox()])]


def _row(name: str, problem: Problem, steps: int) -> list[object]:
    problem.train(steps)
    gauge = Gauge()
    one_pass = problem.forward_backward()
    one_pass()
    first, first_seconds = timed(_reading, gauge, problem)
    unit = cpu_seconds(one_pass)
    products, passes, ratios = [], [], []
    for _ in range(_READINGS):
        problem.train(_SPACING)
        reading, seconds = timed(_reading, gauge, problem)
        engine, build = engine_and_build(problem)
        products.append(reading.matvecs)
        passes.append(seconds / cpu_seconds(one_pass))
        ratios.append(seconds / (reading.matvecs * engine + build))
    return [
        name,
        first.matvecs,
        f"{first_seconds / unit:.0f}",
        f"{median(products):.0f} (up to {max(products)})",
        f"{median(passes):.1f}",
        f"{median(ratios):.2f} (up to {max(ratios):.2f})",
    ]


def _reading(gauge: Gauge, problem: Problem) -> StabilityReading:
    optimizers = [problem.optimizer]
    return gauge.measure(problem.net, problem.loss, [problem.batch], optimizers, step=0, full_batch=True).reading


def _sandbox() -> list[object]:
    """Cost of the isolation itself, where everything else is tiny: a net of 1,210 parameters and 8 samples."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
    x, live = torch.randn(8, 64), list(net.parameters())

    def loss(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return module(batch).square().mean()

    def isolated() -> None:
        sandbox = Sandbox(net)
        with sandbox:
            sandbox.evaluate(loss, x, {p: p.detach().requires_grad_() for p in live})

    seconds = interleaved(
        {"plain": lambda: [loss(net, x) for _ in range(100)], "isolated": lambda: [isolated() for _ in range(100)]}, 9
    )
    return [
        "4 layers deep, 1,210 parameters",
        f"{1e4 * seconds['plain']:.0f} µs",
        f"{1e4 * seconds['isolated']:.0f} µs",
    ]
