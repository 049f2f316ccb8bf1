"""Warm readings of spectra in which a new top is born where the recycled block has no part of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eos_monitor import measure_stability
from tests.readings.spectra import COURSES, Case, wrong


def dtype(seed: int) -> torch.dtype:
    return torch.float32 if seed % 2 else torch.float64


@pytest.mark.parametrize("course", COURSES, ids=lambda course: course.__name__)
def test_no_converged_reading_is_off(course: Callable) -> None:
    readings = 0
    for seed in range(2):
        for n, decay in ((40, 0.0), (400, 3.0)):
            pairs = Case(course, n, seed, decay, dtype(seed)).run()
            readings += sum(reading.converged for reading, _ in pairs[1:])
            assert wrong(pairs) == []
    assert readings >= 60


@pytest.mark.slow
@pytest.mark.parametrize("course", COURSES, ids=lambda course: course.__name__)
def test_no_converged_reading_of_many_is_off(course: Callable) -> None:
    found = []
    readings = 0
    for seed in range(4):
        for n in (40, 400, 4000):
            for decay in (0.0, 3.0):
                pairs = Case(course, n, seed, decay, dtype(seed)).run()
                readings += sum(reading.converged for reading, _ in pairs[1:])
                found += [(n, seed, decay, *off) for off in wrong(pairs)]
    assert readings >= 400
    assert found == []


@pytest.mark.parametrize(
    ("course", "n", "seed", "decay"),
    [
        ("crossing", 400, 18, 3.0),  # not audited, but for the audit before that had found something
        ("crossing", 4000, 21, 3.0),  # the audit left open what mattered
        ("few_ranks", 400, 24, 0.0),  # at the floor, where nothing is relative
        ("turning", 40, 27, 0.0),  # in a plane that its products hardly leave
        ("collapsing", 4000, 0, 0.0),  # another mode took the top's place, and was not the largest
    ],
)
def test_what_audits_of_fewer_solves_had_missed(course: str, n: int, seed: int, decay: float) -> None:
    chosen = next(one for one in COURSES if one.__name__ == course)
    assert wrong(Case(chosen, n, seed, decay, dtype(seed)).run()) == []


class Vector(nn.Module):
    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.theta = nn.Parameter(torch.randn(n, generator=g, dtype=torch.float64).to(dtype))
        self.register_buffer("a", torch.randn(n, generator=g, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("decay", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["concave", "linear"])
def test_where_nothing_curves_upward_the_edge_is_that_of_decay(kind: str, dtype: torch.dtype, decay: float) -> None:
    """λ_max(H) = 0: the self-check compared rounding with rounding, 100 % apart, and there was no edge."""
    net = Vector(1024, dtype)

    def loss(module: nn.Module, _: Tensor) -> Tensor:
        z = (module.a * module.theta).sum()
        return 3.7 * z if kind == "linear" else -torch.sin(0.01 * z).square() - 0.3 * z

    sgd = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=decay)
    reading = measure_stability(net, loss, [torch.zeros(1)], sgd, full_batch=True)
    z = float((net.a.double() * net.theta.detach().double()).sum())
    bend = 0.0 if kind == "linear" else -2e-4 * float(torch.cos(torch.tensor(0.02 * z))) * float(net.a.square().sum())
    assert reading.notes == ()
    assert reading.converged
    assert reading.edge_ratio == pytest.approx(0.05 * (decay + max(0.0, bend)), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_sharpness_beneath_a_large_decay(lr: float) -> None:
    """λ_max(H) = 0.171 under a decay of 100: one product met the tolerance of r, and λ was 20,000 times too small."""
    net = Vector(500, torch.float64)
    h = torch.linspace(0.0, 0.1, 500, dtype=torch.float64)
    h[7] = 0.171
    sgd = torch.optim.SGD(net.parameters(), lr=lr, weight_decay=100.0)
    reading = measure_stability(
        net, lambda m, _: 0.5 * (h * m.theta.square()).sum(), [torch.zeros(1)], sgd, full_batch=True
    )
    assert reading.converged
    assert reading.sharpness == pytest.approx(0.171, rel=0.01)
