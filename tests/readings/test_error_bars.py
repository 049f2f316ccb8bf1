"""The sampling error in closed form, its two parts apart, and when it is not given."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from eos_monitor import Solver, measure_stability
from eos_monitor.curvature.spread import Moments, Spread, spread_of
from eos_monitor.readings.gauge import Gauge
from eos_monitor.readings.uncertainty import SamplingError

LR = 0.5  # so that C = 2 / LR = 4 and A = H / 4


def mean_square(module: Any, batch: Any) -> torch.Tensor:
    return module(batch).square().mean()


def linear(features: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
    net = nn.Linear(features, 1, bias=False).double()
    return net, torch.optim.SGD(net.parameters(), lr=LR)


def rows_with(*hessians: list[list[float]]) -> torch.Tensor:
    """Four rows for each matrix H, of which the mean square has the Hessian 2/4 · XᵀX = H."""
    parts = []
    for h in hessians:
        root = np.linalg.cholesky(np.array(h)).T
        parts += [root, root]
    return torch.tensor(np.concatenate(parts))


def expected_error(parts: list[np.ndarray]) -> float:
    """√(variance of the mean along u + bias²), of the slices' A_b in NumPy."""
    a = [x.T @ x * (2 / len(x)) * LR / 2 for x in parts]
    weights = np.array([len(x) for x in parts]) / sum(map(len, parts))
    values, vectors = np.linalg.eigh(sum(w * one for w, one in zip(weights, a, strict=True)))
    theta, u = values[-1], vectors[:, -1]
    products = np.array([one @ u for one in a])
    m = len(parts)
    covariance = np.cov(products.T)  # by m − 1
    along = u @ covariance @ u
    bias = (np.trace(covariance) - along) / (m * theta)
    assert along / m > 1e-3 * bias**2 > 0
    return float(np.sqrt(along / m + bias**2))


@pytest.mark.parametrize(
    ("sizes", "slices"),
    [([64], 8), ([40, 48], 4), ([24, 24, 24], 3), ([16] * 5, 2), ([8] * 8, 1), ([5, 6, 7, 8, 9, 5, 6, 7, 8], 1)],
    ids=["one-batch", "two", "three", "five", "eight", "nine-uneven"],
)
def test_the_sampling_error_is_that_of_the_parts(sizes: list[int], slices: int) -> None:
    x = np.random.default_rng(0).standard_normal((sum(sizes), 5)) * [1.5, 1.0, 1.0, 0.5, 0.5]
    batches = np.split(x, np.cumsum(sizes)[:-1])
    parts = [part for batch in batches for part in np.split(batch, slices)]
    net, optimizer = linear(5)
    reading = measure_stability(net, mean_square, [torch.tensor(b) for b in batches], optimizer, rtol=1e-9)
    assert reading.edge_ratio is not None
    assert reading.sampling_error == pytest.approx(expected_error(parts), rel=1e-6)
    assert reading.error == pytest.approx(reading.sampling_error, rel=1e-6)  # the solve is exact


def test_over_processes_the_parts_of_all_count() -> None:
    """Two processes with the same samples: as one that has each of them twice."""
    x = np.random.default_rng(0).standard_normal((64, 5)) * [1.5, 1.0, 1.0, 0.5, 0.5]
    parts = np.split(x, 8)
    net, optimizer = linear(5)
    found = Gauge(Solver(rtol=1e-9)).measure(
        net, mean_square, [torch.tensor(x)], [optimizer], step=0, full_batch=False, sum_over_ranks=lambda flat: 2 * flat
    )
    assert found.reading.samples == 128
    assert found.reading.sampling_error == pytest.approx(expected_error(parts * 2), rel=1e-6)


def test_variance_alone() -> None:
    """Slices of 4 ± 1 along the mode: the variance of eight is 8/7, a quarter of the numbers is A."""
    x = rows_with(*[[[4.0 + sign, 0.0], [0.0, 1.0]] for sign in (1.0, -1.0) * 4])
    net, optimizer = linear(2)
    reading = measure_stability(net, mean_square, [x], optimizer, rtol=1e-9)
    assert reading.edge_ratio == pytest.approx(1.0)
    assert reading.sampling_error == pytest.approx(math.sqrt(8 / 7 / 8) / 4, rel=1e-6)


def test_bias_alone() -> None:
    """Slices that agree along the mode and turn it to either side by 1: 8/7 across, over 8 θ."""
    x = rows_with(*[[[4.0, sign], [sign, 1.0]] for sign in (1.0, -1.0) * 4])
    net, optimizer = linear(2)
    reading = measure_stability(net, mean_square, [x], optimizer, rtol=1e-9)
    assert reading.edge_ratio == pytest.approx(1.0)
    assert reading.sampling_error == pytest.approx((8 / 7) / 16 / 8, rel=1e-6)


def test_alike_slices_have_no_error() -> None:
    net, optimizer = linear(2)
    reading = measure_stability(net, mean_square, [rows_with(*[[[4.0, 0.0], [0.0, 1.0]]] * 8)], optimizer)
    assert reading.sampling_error == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("full_batch", [False, True])
def test_no_curvature_upwards_has_no_relative_error(full_batch: bool) -> None:
    net, optimizer = linear(2)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reading = measure_stability(net, lambda m, b: -mean_square(m, b), [x], optimizer, full_batch=full_batch)
    assert reading.edge_ratio is not None
    assert reading.edge_ratio < 0.0
    assert reading.sampling_error == (0.0 if full_batch else None)


def test_an_error_is_carried_to_other_edge_ratios_in_proportion() -> None:
    assert SamplingError(0.25).at(2.0) == 0.5
    assert SamplingError(0.25).at(0.0) is SamplingError(0.25).at(-1.0) is SamplingError().at(2.0) is None


def test_the_error_is_renewed_with_every_tenth_positive_edge() -> None:
    """Probes of two spreads take turns; what is stated is that of the first, the eleventh, the twenty-first edge."""
    calm = rows_with(*[[[4.0 + 0.1 * sign, 0.0], [0.0, 1.0]] for sign in (1.0, -1.0) * 4])
    wild = rows_with(*[[[4.0 + sign, 0.0], [0.0, 1.0]] for sign in (1.0, -1.0) * 4])
    net, optimizer = linear(2)
    gauge = Gauge(Solver(rtol=1e-6))
    sign = 1.0

    def loss(module: Any, batch: Any) -> torch.Tensor:
        return sign * mean_square(module, batch)

    found = []
    for step in range(23):
        sign = -1.0 if step == 3 else 1.0  # this one has no edge, and does not count
        probe = wild if step % 2 == 0 or step > 11 else calm
        reading = gauge.measure(net, loss, [probe], [optimizer], step=step, full_batch=False).reading
        found.append(reading.sampling_error)
    assert found[3] is None
    high = math.sqrt(8 / 7 / 8) / 4
    counted = [error for error in found if error is not None]
    assert counted[:10] == pytest.approx([high] * 10, rel=1e-4)
    assert counted[10:20] == pytest.approx([0.1 * high] * 10, rel=1e-4)
    assert counted[20:] == pytest.approx([high] * 2, rel=1e-4)


def test_a_reading_on_all_the_data_does_not_use_the_sample_of_another() -> None:
    wild = rows_with(*[[[4.0 + sign, 0.0], [0.0, 1.0]] for sign in (1.0, -1.0) * 4])
    net, optimizer = linear(2)
    gauge = Gauge(Solver(rtol=1e-6))
    errors = []
    for step, full in enumerate((True, False, True)):
        reading = gauge.measure(net, mean_square, [wild], [optimizer], step=step, full_batch=full).reading
        errors.append(reading.sampling_error)
    assert errors[0] == errors[2] == 0.0
    assert errors[1] == pytest.approx(math.sqrt(8 / 7 / 8) / 4, rel=1e-4)


# Slices that do not make up the whole.


@pytest.mark.parametrize(("factor", "given"), [(0.89, False), (0.91, True), (1.09, True), (1.11, False)])
def test_slices_must_have_the_mean_of_the_whole_to_a_tenth(factor: float, given: bool) -> None:
    def off(module: Any, batch: Any) -> torch.Tensor:
        return (1.0 if len(batch) == 32 else factor) * mean_square(module, batch)

    net, optimizer = linear(2)
    x = rows_with(*[[[4.0, 0.0], [0.0, 1.0]]] * 8)
    reading = measure_stability(net, off, [x], optimizer)
    assert reading.edge_ratio == pytest.approx(1.0)
    assert (reading.sampling_error is not None) is given
    assert any("mean over samples" in note for note in reading.notes) is not given


@pytest.mark.parametrize(
    ("mean", "along", "reproduces"),
    [
        (5.4, 0.8, True),  # a tenth of the whole, and three deviations of a mean of 20: 0.5 + 3 · 0.2
        (6.05, 0.8, True),
        (6.15, 0.8, False),
        (3.95, 0.8, True),
        (3.85, 0.8, False),
        (5.45, 0.0, True),
        (5.55, 0.0, False),
        (5.45, -1e-18, True),  # rounding
    ],
)
def test_chance_explains_three_deviations(mean: float, along: float, reproduces: bool) -> None:
    spread = Spread(20, mean=mean, along=along, across=0.0, whole=5.0)
    assert spread.reproduces is reproduces
    mirrored = Spread(20, mean=-mean, along=along, across=0.0, whole=-5.0)
    assert mirrored.reproduces is reproduces


def test_moments_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    products = rng.standard_normal((9, 4)) + 2.0
    weights = rng.integers(1, 9, 9).astype(float)
    u = np.array([0.6, 0.0, 0.8, 0.0])
    moments = Moments(torch.tensor(u), torch.device("cpu"))
    for product, weight in zip(products, weights, strict=True):
        moments.add(torch.tensor(product), weight)
    covariance = np.cov(products.T)
    along = u @ covariance @ u
    for whole in (None, 7.0):
        spread = spread_of(moments.total, whole)
        assert spread is not None
        assert spread.parts == 9
        assert spread.mean == pytest.approx(np.average(products @ u, weights=weights))
        assert spread.along == pytest.approx(along)
        assert spread.across == pytest.approx(np.trace(covariance) - along)
        assert spread.whole == pytest.approx(spread.mean if whole is None else whole)
    # the sums of two processes are the sums over all
    halves = [Moments(torch.tensor(u), torch.device("cpu")) for _ in range(2)]
    for i, (product, weight) in enumerate(zip(products, weights, strict=True)):
        halves[i % 2].add(torch.tensor(product), weight)
    both = spread_of(halves[0].total + halves[1].total, None)
    assert both is not None
    assert both.along == pytest.approx(along)
    halves[1].give_up()
    assert spread_of(halves[0].total + halves[1].total, None) is None
