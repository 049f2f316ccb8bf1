"""Warm readings along full-batch gradient descent through the edge, against ARPACK on float64 copies of the net."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn

from eos_monitor.readings.gauge import Gauge
from eos_monitor.readings.reading import StabilityReading

Batch = tuple[Tensor, Tensor]


def squared_error(module: nn.Module, batch: Batch) -> Tensor:
    return 0.5 * (module(batch[0]) - F.one_hot(batch[1], 10)).square().sum(dim=1).mean()


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def tanh_mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def gelu_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 6, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 12, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 10)),
    )


@dataclass(frozen=True)
class Trajectory:
    """Full-batch gradient descent on the first ``samples`` digits, with a reading every ``every`` steps."""

    net: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Batch], Tensor]
    samples: int
    lr: float
    seed: int
    first: int
    last: int
    every: int

    def run(self) -> list[tuple[StabilityReading, float]]:
        """Return the readings, each with the edge ratio by ARPACK."""
        torch.manual_seed(self.seed)
        net, batch = self.net(), digits(self.samples)
        sgd = torch.optim.SGD(net.parameters(), lr=self.lr)
        gauge = Gauge()
        pairs = []
        for step in range(self.last + 1):
            if step >= self.first and (step - self.first) % self.every == 0:
                reading = gauge.measure(net, self.loss_fn, [batch], [sgd], step=step, full_batch=True).reading
                pairs.append((reading, self.lr / 2 * top_eigenvalue(net, self.loss_fn, batch)))
            sgd.zero_grad()
            self.loss_fn(net, batch).backward()
            sgd.step()
        return pairs


def digits(samples: int) -> Batch:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32)
    return ((x - x.mean(0)) / (x.std(0) + 1e-2))[:samples], torch.tensor(labels)[:samples]


def top_eigenvalue(net: nn.Module, loss_fn: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> float:
    """Largest algebraic eigenvalue of the loss Hessian, in double precision."""
    net = copy.deepcopy(net).double()
    params = list(net.parameters())
    shapes = [p.shape for p in params]
    gradients = torch.autograd.grad(loss_fn(net, (batch[0].double(), batch[1])), params, create_graph=True)

    def product(v: np.ndarray) -> np.ndarray:
        flat = torch.from_numpy(np.array(v).reshape(-1))
        pieces = torch.split(flat, [s.numel() for s in shapes])
        parts = [piece.view(s) for piece, s in zip(pieces, shapes, strict=True)]
        products = torch.autograd.grad(gradients, params, parts, retain_graph=True)
        return torch.cat([p.reshape(-1) for p in products]).numpy()

    n = sum(s.numel() for s in shapes)
    # Two pairs, because ARPACK itself can settle on the second of two close ones; at this tolerance the value is good
    # to about its square over the gap, far below the 1 % in question.
    v0 = np.random.default_rng(0).standard_normal(n)
    values = eigsh(
        LinearOperator((n, n), matvec=product, dtype=np.float64),
        k=2,
        which="LA",
        tol=1e-4,
        v0=v0,
        return_eigenvectors=False,
    )
    return float(values.max())


def check(trajectory: Trajectory) -> None:
    pairs = trajectory.run()
    ratios = np.array([reading.edge_ratio for reading, _ in pairs])
    truths = np.array([truth for _, truth in pairs])
    errors = np.abs(ratios / truths - 1)
    warm = [reading.matvecs for reading, _ in pairs[1:]]

    assert len(warm) >= 20
    assert truths[0] < 0.8  # it starts below the edge
    assert truths.max() >= 1.0  # and goes through it
    assert all(reading.converged for reading, _ in pairs)
    assert [(pairs[i][0].step, errors[i]) for i in np.flatnonzero(errors > 0.01)] == []
    assert np.median(warm) <= 6


MLP = Trajectory(partial(tanh_mlp, 96), squared_error, samples=256, lr=0.2, seed=11, first=40, last=1000, every=40)
CNN = Trajectory(gelu_cnn, cross_entropy, samples=128, lr=0.1, seed=12, first=200, last=720, every=20)


@pytest.mark.parametrize("trajectory", [MLP, CNN], ids=["mlp", "cnn"])
def test_warm_readings_are_cheap_and_right_along_a_trajectory(trajectory: Trajectory) -> None:
    check(trajectory)


@pytest.mark.slow
@pytest.mark.parametrize("every", [10, 25])
@pytest.mark.parametrize("trajectory", [MLP, CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize("seed", [21, 22])
def test_warm_readings_are_cheap_and_right_at_other_seeds_and_spacings(
    trajectory: Trajectory, seed: int, every: int
) -> None:
    check(replace(trajectory, seed=seed, every=every))


def test_a_warm_reading_does_not_stay_behind_a_crossing() -> None:
    # Stopped at a residual of 1e-2, the readings of steps 50 to 100 followed the second eigenvalue, 1.5 to 4 % too low.
    crossing = Trajectory(partial(tanh_mlp, 120), squared_error, 300, lr=0.2, seed=2, first=0, last=120, every=10)
    assert max(abs(reading.edge_ratio / truth - 1) for reading, truth in crossing.run() if reading.edge_ratio) <= 0.01


def test_a_cold_reading_with_bfloat16_parameters_converges() -> None:
    torch.manual_seed(3)
    net, (x, y) = tanh_mlp(96).bfloat16(), digits(256)
    sgd = torch.optim.SGD(net.parameters(), lr=0.2)
    batch = (x.bfloat16(), y)
    reading = Gauge().measure(net, cross_entropy, [batch], [sgd], step=0, full_batch=True).reading
    assert reading.converged
    # Products carry the rounding of bfloat16, 2⁻⁸ = 0.4 %.
    assert reading.edge_ratio == pytest.approx(0.1 * top_eigenvalue(net, cross_entropy, batch), rel=1e-2)
