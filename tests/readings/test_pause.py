"""Solves that are cut off when their time is up, and what becomes of them at the next reading."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eos_monitor import Probe, StabilityProbe
from eos_monitor.curvature.audit import Audit
from eos_monitor.curvature.lanczos import lanczos_recycled
from eos_monitor.readings.pause import Pause

N = 300


def spectrum(seed: int) -> np.ndarray:
    """A spectrum that a cold solve takes some 25 products for."""
    values = np.random.default_rng(seed).uniform(0.0, 9.0, N)
    values[:2] = (10.0, 9.6)
    return values


class Counted:
    """A diagonal operator in a random basis, whose time is up after so many products a solve."""

    def __init__(self, values: np.ndarray, allowed: int) -> None:
        q = np.linalg.qr(np.random.default_rng(1).standard_normal((N, N)))[0]
        self.matrix = torch.from_numpy(q @ np.diag(values) @ q.T)
        self.size = N
        self.dtype = torch.float64
        self.device = torch.device("cpu")
        self.allowed = allowed
        self.products = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ v

    def late(self) -> bool:
        return self.products >= self.allowed


@pytest.mark.parametrize("allowed", [0, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_solve_that_is_cut_off_goes_on_at_the_next_reading(allowed: int, seed: int) -> None:
    operator = Counted(spectrum(seed), allowed)
    generator = torch.Generator().manual_seed(seed)
    block: Tensor | None = None
    residuals = []
    for _ in range(60):
        operator.products = 0
        found = lanczos_recycled(
            operator, block, k=1, rtol=1e-3, atol=0.0, max_matvecs=64, generator=generator, late=operator.late
        )
        block = found.block
        assert operator.products == found.spectrum.matvecs <= max(3, allowed)
        residuals.append(float(found.spectrum.residuals[0]))
        if found.spectrum.converged:
            break
    assert 2 <= len(residuals) < 60  # not at once
    assert float(found.spectrum.eigenvalues[0]) == pytest.approx(10.0, rel=1e-4)
    assert residuals[-1] < 0.1 * residuals[0]


@pytest.mark.parametrize(("allowed", "converged"), [(1, False), (3, False), (20, True)])
def test_what_could_not_be_audited_in_time_has_not_converged(allowed: int, converged: bool) -> None:
    """The block is exactly invariant, and an eigenvalue outside of it has grown past its own."""
    operator = Counted(spectrum(0), allowed)
    values, vectors = torch.linalg.eigh(operator.matrix)
    z = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = lanczos_recycled(
        operator,
        vectors[:, -2:-1],
        k=1,
        rtol=1e-2,
        atol=0.0,
        max_matvecs=64,
        generator=torch.Generator().manual_seed(0),
        late=operator.late,
        audit=lambda *_: Audit(z, 1.0 / N, 3, 14, 5e-3, 0.0),
    )
    assert found.spectrum.converged is converged
    assert math.isfinite(found.open)
    if converged:
        assert float(found.spectrum.eigenvalues[0]) + found.open >= float(values[-1]) * (1 - 1e-3)


def quadratic(h: Tensor) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    net = nn.Module()
    net.theta = nn.Parameter(torch.ones(len(h), dtype=torch.float64))
    return net, lambda m, _: 0.5 * (h * m.theta.square()).sum()


def test_a_reading_that_is_cut_off_says_so_and_moves_no_verdict() -> None:
    h = torch.from_numpy(spectrum(0))
    net, loss_fn = quadratic(h)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=Probe(full_batch=True, max_pause=1e-9), alerts=())
    with pytest.warns(UserWarning, match="did not converge in 3 products"):
        reading = probe.step(torch.zeros(1))
    assert reading is not None
    assert reading.matvecs == 3
    assert not reading.converged
    assert reading.edge_scale is None
    assert any("cut off after 3 products" in note for note in reading.notes)
    assert probe.verdict.name == "WARMING_UP"


def test_without_a_limit_nothing_is_cut_off() -> None:
    h = torch.from_numpy(spectrum(0))
    net, loss_fn = quadratic(h)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=Probe(full_batch=True), alerts=())
    reading = probe.step(torch.zeros(1))
    assert reading is not None
    assert reading.converged
    assert reading.edge_ratio == pytest.approx(0.05 * float(h.max()), rel=1e-3)


def test_the_time_of_a_reading_is_up_on_all_processes_at_once() -> None:
    now = 0.0
    pause = Pause(lambda: now)
    pause.begin(None, None)
    now = 1e9
    assert not pause.is_over()
    pause.begin(10.0, None)
    now += 6.9
    assert not pause.is_over()
    pause.begin(10.0, lambda here: here + 1.0)  # another process is late
    assert pause.is_over()
    pause.begin(10.0, lambda here: here)
    assert not pause.is_over()
    now += 7.1
    assert pause.is_over()


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"Expected `max_pause` > 0 or None, got 0\.0"):
        Probe(max_pause=0.0)
