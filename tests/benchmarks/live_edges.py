"""Full-batch runs of real optimizers on a small net, with the edge ratio read from their live state.

python -m tests.benchmarks.live_edges [name ...]    which learning rate each would get by the rule below

Every learning rate is the smallest of the grid 1, 2, 5 · 10ᵏ at which the first half of the run ends at the edge: the
median of the readings over its second quarter is at least 0.95. What the second half does plays no part in the choice.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.readings.gauge import Gauge
from tests.benchmarks.problems import digits

STEPS = 2000
EVERY = 20
BAND = (0.85, 1.1)
_REACHED = 0.95
_GRID = (1, 2, 5)
_SAMPLES = 200


@dataclass(frozen=True)
class Live:
    """An optimizer in use.

    Attributes:
        kind: Class in ``torch.optim``.
        lr: Learning rate, by the rule above.
        options: Other settings.
        banded: Whether the mean edge ratio over the second half must lie in the band.
    """

    kind: str
    lr: float
    options: tuple[tuple[str, Any], ...] = ()
    banded: bool = True

    def build(self, params: Any, lr: float | None = None) -> Optimizer:
        optimizer: Optimizer = getattr(torch.optim, self.kind)(params, lr=lr or self.lr, **dict(self.options))
        return optimizer


CASES: dict[str, Live] = {
    "SGD": Live("SGD", 1.0),
    "heavy ball": Live("SGD", 1.0, (("momentum", 0.5),)),
    "RMSprop": Live("RMSprop", 5e-4),
    "Adagrad": Live("Adagrad", 5e-2),
    "Adam": Live("Adam", 5e-2),
    "AdamW": Live("AdamW", 5e-2),
    "NAdam": Live("NAdam", 5e-3),
    "RAdam": Live("RAdam", 0.1),
    # With the default β2 = 0.999 the decayed maximum outlives the gradients, and no rate reaches the edge.
    "Adamax": Live("Adamax", 1e-3, (("betas", (0.9, 0.99)),)),
    "Nesterov": Live("SGD", 0.5, (("momentum", 0.9), ("nesterov", True)), banded=False),
    # Fits the labels before the curvature has climbed; at 2 its loss is soon no longer finite.
    "heavy ball, 0.9": Live("SGD", 1.0, (("momentum", 0.9),), banded=False),
    "AMSGrad": Live("Adam", 0.1, (("amsgrad", True),), banded=False),
    "Adadelta": Live("Adadelta", 1.0, banded=False),
    "ASGD": Live("ASGD", 1.0, banded=False),
    "Adafactor": Live("Adafactor", 5e-3, banded=False),
}


@dataclass(frozen=True)
class Trail:
    """Edge ratios along a run.

    Attributes:
        steps: Steps at which they were read.
        ratios: The edge ratios.
        loss: Loss at the last reading.
    """

    steps: tuple[int, ...]
    ratios: tuple[float, ...]
    loss: float

    def between(self, first: int, last: int) -> list[float]:
        return [ratio for step, ratio in zip(self.steps, self.ratios, strict=True) if first <= step < last]

    @property
    def second_half(self) -> list[float]:
        return self.between(STEPS // 2, STEPS)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.second_half)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.second_half)

    @property
    def within_band(self) -> float:
        """Share of the readings of the second half."""
        return statistics.fmean(BAND[0] <= ratio <= BAND[1] for ratio in self.second_half)


def net() -> nn.Sequential:
    """1,066 parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10))
        return nn.Sequential(*layers).double()


def batch() -> tuple[Tensor, Tensor]:
    x, y = digits(_SAMPLES)
    return x.double(), F.one_hot(y, 10).double()


def squared_error(module: Any, batch: Any) -> Tensor:
    """Half the squared distance of the outputs from the labels, the mean over samples."""
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(dim=1).mean()


def run(case: Live, *, lr: float | None = None, first: int = STEPS // 2, last: int = STEPS) -> Trail:
    """Train with the whole data at every step; read the edge ratio every 20 ± 4 steps between two steps."""
    module, data = net(), batch()
    optimizer = case.build(module.parameters(), lr)
    gauge, jitter = Gauge(), np.random.default_rng(0)
    steps, ratios, loss, due = [], [], math.nan, first
    for step in range(last):
        if step == due:
            reading = gauge.measure(module, squared_error, [data], [optimizer], step=step, full_batch=True).reading
            if reading.edge_ratio is None or not reading.converged:
                break
            steps.append(step)
            ratios.append(reading.edge_ratio)
            loss = reading.loss if reading.loss is not None else math.nan
            # A regular reading would alias with periodic orbits.
            due += int(jitter.integers(EVERY - EVERY // 5, EVERY + EVERY // 5 + 1))
        optimizer.zero_grad()
        value = squared_error(module, data)
        if not torch.isfinite(value):
            break
        value.backward()
        optimizer.step()
    return Trail(tuple(steps), tuple(ratios), loss)


def smallest_rate(case: Live) -> tuple[float | None, dict[float, float]]:
    """Return the learning rate by the rule, and the medians on the way to it, from a tenth of the one in use on."""
    medians: dict[float, float] = {}
    power = math.floor(math.log10(case.lr / 10) + 1e-9)
    rates = [float(f"{digit}e{power + more}") for more in range(4) for digit in _GRID]
    for lr in (rate for rate in rates if rate >= case.lr / 10.1):
        ratios = run(case, lr=lr, first=STEPS // 4, last=STEPS // 2).ratios
        medians[lr] = statistics.median(ratios) if ratios else math.nan
        if medians[lr] >= _REACHED:
            return lr, medians
    return None, medians


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.live_edges", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"some of {', '.join(CASES)}; default all")
    torch.set_num_threads(1)
    for name in parser.parse_args().names or CASES:
        case = CASES[name]
        lr, medians = smallest_rate(case)
        trail = ", ".join(f"{rate:g}: {median:.2f}" for rate, median in medians.items())
        print(f"{name}: {lr} (in use {case.lr}); {trail}", flush=True)


if __name__ == "__main__":
    main()
