"""Quadratics whose spectrum is set by hand, reading by reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eos_monitor.readings.gauge import Gauge
from eos_monitor.readings.reading import StabilityReading

LR = 0.1
READINGS = 20


class Quadratic(nn.Module):
    """½ Σ hᵢ θᵢ², whose coordinates do not feel one another."""

    curvatures: Tensor
    plane: Tensor

    def __init__(self, n: int, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.theta = nn.Parameter(torch.randn(n, generator=g, dtype=torch.float64).to(dtype))
        self.register_buffer("curvatures", torch.zeros(n, dtype=dtype))
        self.register_buffer("plane", torch.zeros(2, 2, dtype=dtype))  # beside the curvatures of the first two


def energy(module: nn.Module, _: Tensor) -> Tensor:
    pair = module.theta[:2]
    return 0.5 * (module.curvatures * module.theta.square()).sum() + 0.5 * pair @ module.plane @ pair


@dataclass(frozen=True)
class Case:
    """A course of the spectrum: curvatures at each reading, and the decay that the optimizer adds."""

    course: Callable[[np.random.Generator, int], Iterator[np.ndarray]]
    n: int
    seed: int
    decay: float = 0.0
    dtype: torch.dtype = torch.float64

    def run(self) -> list[tuple[StabilityReading, float]]:
        """Return the readings, each with the edge ratio that the largest curvature gives."""
        net = Quadratic(self.n, self.dtype, self.seed)
        sgd = torch.optim.SGD(net.parameters(), lr=LR, weight_decay=self.decay)
        gauge = Gauge()
        pairs = []
        for step, state in enumerate(self.course(np.random.default_rng(self.seed), self.n)):
            h, plane = state if isinstance(state, tuple) else (state, np.zeros((2, 2)))
            net.curvatures.copy_(torch.from_numpy(h))
            net.plane.copy_(torch.from_numpy(plane))
            top = max(h[2:].max(), np.linalg.eigvalsh(np.diag(h[:2]) + plane)[-1])
            reading = gauge.measure(net, energy, [torch.zeros(1)], [sgd], step=step, full_batch=True).reading
            pairs.append((reading, LR / 2 * (float(top) + self.decay)))
            sgd.zero_grad()
            energy(net, torch.zeros(1)).backward()
            sgd.step()
        return pairs


def growing(rng: np.random.Generator, n: int) -> Iterator[np.ndarray]:
    """One curvature grows out of the bulk past a top that stays."""
    h = rng.uniform(0.0, rng.uniform(2.0, 8.0), n)
    h[0] = 10.0
    rate = rng.choice([1.02, 1.05, 1.1, 1.3, 2.0])
    for _ in range(READINGS):
        yield h
        h[1] = min(h[1] * rate, 40.0)
        rate = min(rate, 1.3) if h[1] < 10.0 else rate
        h[1] = max(h[1], 1.0)


def leaping(rng: np.random.Generator, n: int) -> Iterator[np.ndarray]:
    """Any curvature leaps past the top, by 2 % to 5 times, and stays for a while."""
    h = rng.uniform(0.0, 5.0, n)
    h[0] = 10.0
    for t in range(READINGS):
        yield h
        if t % 4 == 3:
            h[rng.integers(1, n)] = h.max() * rng.choice([1.02, 1.1, 1.5, 5.0]) if h.max() < 1e3 else 1.0


def rank_deficient(rng: np.random.Generator, n: int) -> Iterator[np.ndarray]:
    """One curvature of either sign, everything else flat."""
    for _ in range(READINGS):
        h = np.zeros(n)
        h[3] = rng.choice([-1.0, 1.0]) * 10.0 ** rng.uniform(-1.0, 2.0)
        yield h


def few_ranks(rng: np.random.Generator, n: int) -> Iterator[np.ndarray]:
    """Five curvatures that come and go, everything else flat."""
    h = np.zeros(n)
    for _ in range(READINGS):
        h[:5] = np.where(rng.random(5) < 0.4, rng.normal(0.0, 10.0, 5), h[:5])
        yield h


def crossing(rng: np.random.Generator, n: int) -> Iterator[np.ndarray]:
    """Three curvatures swing past one another, and past a bulk."""
    h = rng.uniform(0.0, 4.0, n)
    phase = rng.uniform(0.0, 6.28, 3)
    period = rng.uniform(4.0, 30.0, 3)
    for t in range(READINGS):
        h[:3] = 6.0 + 4.0 * np.sin(phase + 6.28 * t / period)
        yield h


def collapsing(rng: np.random.Generator, n: int) -> Iterator[np.ndarray]:
    """The top falls below the bulk, at once or by and by, and others in its place."""
    h = np.sort(rng.exponential(1.0, n))[::-1].copy()
    rate = rng.choice([0.0, 0.3, 0.8, -1.0])
    for t in range(READINGS):
        yield h
        top = int(h.argmax())
        h[top] *= rate if t % 3 == 2 else 0.95
        h += 1e-3


def sinking(rng: np.random.Generator, n: int) -> Iterator[np.ndarray]:
    """Everything falls, at rates of its own."""
    h = rng.exponential(3.0, n)
    rate = rng.uniform(0.6, 1.0, n)
    for _ in range(READINGS):
        yield h
        h = h * rate


def turning(rng: np.random.Generator, n: int) -> Iterator[np.ndarray]:
    """A top whose vector turns within a plane, and now and then a curvature elsewhere that outgrows it."""
    h = rng.uniform(0.0, 5.0, n)
    h[:2] = 0.0
    turn = rng.uniform(0.01, 0.5)
    rate = rng.choice([1.1, 1.5, 5.0])
    for t in range(READINGS):
        c = np.cos(turn * t)
        s = np.sin(turn * t)
        plane = np.array([[c, -s], [s, c]]) @ np.diag([10.0, 4.0]) @ np.array([[c, s], [-s, c]])
        yield h, plane
        if t > 3:
            h[2] = 4.0 * rate if h[2] < 4.0 else h[2] * rate if h[2] < 50.0 else 0.0


COURSES = (growing, leaping, rank_deficient, few_ranks, crossing, collapsing, sinking, turning)


def wrong(pairs: list[tuple[StabilityReading, float]]) -> list[tuple[int, float, float]]:
    """Return step, edge ratio and truth of the warm readings that are called converged, and are off by over 1 %."""
    return [
        (reading.step, reading.edge_ratio or 0.0, truth)
        for reading, truth in pairs[1:]
        if reading.converged and abs((reading.edge_ratio or 0.0) - truth) > 0.01 * abs(truth) + 1e-6
    ]
