"""The operator of a reading against its dense matrix, and what a warm solver does with it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eos_monitor import HessianOperator, Solver, lanczos
from eos_monitor.limits.thresholds import CriticalCurvature
from eos_monitor.readings.edge_solver import EdgeOperator, StartVectors, WarmSolver

N = 6


class Quadratic(nn.Module):
    """½ θᵀHθ."""

    def __init__(self, h: np.ndarray, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(len(h), dtype=dtype))
        self.h = torch.tensor(h, dtype=dtype)


def loss_fn(module: Any, batch: Any) -> Tensor:
    return 0.5 * module.theta @ (module.h @ module.theta)


def symmetric(seed: int = 0, n: int = N) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal((n, n))
    return a + a.T


def curvature(net: nn.Module, c: Any, l2: Any = 0.0, **settings: Any) -> CriticalCurvature:
    (p,) = net.parameters()
    full = torch.ones(p.numel(), dtype=p.dtype)
    return CriticalCurvature(
        c=full * torch.as_tensor(c),
        l2=full * torch.as_tensor(l2),
        threshold=None,
        params=(p,),
        names=("theta",),
        **settings,
    )


def edge_of(h: np.ndarray, c: Any, l2: Any = 0.0, dtype: torch.dtype = torch.float64, **settings: Any) -> EdgeOperator:
    net = Quadratic(h, dtype)
    return EdgeOperator(HessianOperator(net, loss_fn, [torch.zeros(1)]), curvature(net, c, l2, **settings))


def dense(edge: EdgeOperator) -> np.ndarray:
    return np.array([edge.matvec(e).numpy() for e in torch.eye(edge.size, dtype=edge.dtype)])


C = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
W = np.array([0.5, 0.0, 0.1, 0.2, 0.0, 0.3])


@pytest.mark.parametrize("sign", [1, -1])
def test_products_are_those_of_the_dense_matrix(sign: int) -> None:
    h = symmetric()
    edge = edge_of(h, C, W, sign=sign)
    root = np.diag(C**-0.5)
    assert np.allclose(dense(edge), root @ (sign * h + np.diag(W)) @ root, atol=1e-12)
    assert edge.mask is None
    assert edge.dimension == N
    assert edge.floor == pytest.approx(np.max(W / C))
    assert edge.shift == 0.0


def test_a_common_decay_is_in_every_eigenvalue() -> None:
    edge = edge_of(symmetric(), 4.0, 0.5)
    assert edge.floor == edge.shift == pytest.approx(0.125)
    assert np.allclose(dense(edge), (symmetric() + 0.5 * np.eye(N)) / 4, atol=1e-12)
    assert edge_of(symmetric(), C, 0.5).shift == 0.0
    assert edge_of(symmetric(), 4.0, W).shift == 0.0


def test_coordinates_without_a_threshold_are_left_out() -> None:
    h = symmetric()
    c = np.where(np.arange(N) < 2, np.inf, C)
    edge = edge_of(h, c, W)
    found = dense(edge)
    root = np.diag(C[2:] ** -0.5)
    assert np.allclose(found[2:, 2:], root @ (h[2:, 2:] + np.diag(W[2:])) @ root, atol=1e-12)
    assert not found[:2].any()
    assert not found[:, :2].any()
    assert edge.mask is not None
    assert edge.mask.tolist() == [False, False, True, True, True, True]
    assert edge.dimension == 4
    assert edge.floor == pytest.approx(np.max(W[2:] / C[2:]))


@pytest.mark.parametrize(("least", "expected"), [(1e-13, 1e-12), (2e-12, 2e-12), (0.0, 1e-12)])
def test_a_dead_unit_counts_as_a_billionth_of_a_thousandth_of_the_median(least: float, expected: float) -> None:
    c = np.array([least, 1.0, 1.0, 1.0, 1.0, 1.0])
    edge = edge_of(np.eye(N), c)
    assert float(edge.scale[0]) == pytest.approx(expected**-0.5)
    assert float(edge.scale[1]) == 1.0


def test_modes_are_in_parameter_space() -> None:
    h = symmetric(3)
    edge = edge_of(h, C)
    solution = WarmSolver(2, Solver(rtol=1e-10), StartVectors(0)).solve(edge)
    values, vectors = np.linalg.eig(np.diag(1 / C) @ h)  # C⁻¹ H x = r x
    order = np.argsort(values.real)[::-1][:2]
    assert solution.top == pytest.approx(values.real[order[0]], rel=1e-8)
    for i, place in enumerate(order):
        x = solution.modes[:, i].numpy()
        assert np.allclose(h @ x, values.real[place] * C * x, atol=1e-6)
        assert x @ np.diag(C) @ x == pytest.approx(1.0)
    assert np.array_equal(solution.mode.numpy(), solution.modes[:, 0].numpy())
    assert vectors.shape == (N, N)


# The solver.


def test_start_vectors_are_those_of_the_seed() -> None:
    edge = edge_of(symmetric(), C)
    starts = StartVectors(5)
    expected = torch.randn(N, generator=torch.Generator().manual_seed(5))
    assert torch.equal(starts.vector(edge), expected.double())
    assert not torch.equal(starts.vector(edge), expected.double())  # the next one


def crowd(n: int, *top: float) -> np.ndarray:
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))[0]
    return q @ np.diag([*top, *np.linspace(-0.2, 0.2, n - len(top))]) @ q.T


def test_solves_and_products_are_counted() -> None:
    edge = edge_of(crowd(50, 1.0, 0.5), 1.0)
    solver = WarmSolver(1, Solver(), StartVectors(0))
    spent = 0
    for count in (1, 2, 3):
        spent += solver.solve(edge).spectrum.matvecs
        assert (solver.solves, solver.matvecs) == (count, spent)


def test_a_cold_solve_is_tight_and_a_warm_one_is_not() -> None:
    h = crowd(80, 1.0, 0.9)
    solver = WarmSolver(1, Solver(rtol=1e-2), StartVectors(0))
    cold = solver.solve(edge_of(h, 1.0)).spectrum
    assert float(cold.residuals[0]) <= 1e-4 * float(cold.eigenvalues[0])
    moved = h + 0.03 * crowd(80, 0.5) @ np.diag(np.sign(np.arange(80) - 40.5)) @ crowd(80, 0.5)
    warm = solver.solve(edge_of((moved + moved.T) / 2, 1.0)).spectrum
    assert warm.converged
    assert float(warm.residuals[0]) <= 4e-3 * float(warm.eigenvalues[0])
    assert warm.matvecs < cold.matvecs


def test_another_size_starts_cold() -> None:
    solver = WarmSolver(1, Solver(rtol=1e-2), StartVectors(0))
    solver.solve(edge_of(crowd(80, 1.0, 0.9), 1.0))
    other = solver.solve(edge_of(crowd(60, 1.0, 0.9), 1.0)).spectrum
    assert float(other.residuals[0]) <= 1e-4
    assert other.eigenvectors.shape == (60, 1)


@pytest.mark.parametrize(
    ("values", "near"),
    [
        ([0.76, 0.74, 0.2], 1),
        ([0.74, 0.73, 0.2], 1),  # one at least
        ([1.2, 1.1, 0.9, 0.8, 0.76, 0.74], 5),
        ([2.0 - 0.05 * i for i in range(20)], 16),  # sixteen at most
    ],
)
def test_all_modes_of_three_quarters_are_found(values: list[float], near: int) -> None:
    solver = WarmSolver(1, Solver(k="edge", rtol=1e-6, max_matvecs=400), StartVectors(0))
    edge = edge_of(crowd(60, *values), 1.0)
    for _ in range(2):
        before = solver.matvecs
        solution = solver.solve_near_edge(edge)
        spectrum = solution.spectrum
        assert np.allclose(spectrum.eigenvalues.numpy(), values[:near], rtol=1e-5)
        assert spectrum.eigenvectors.shape == (60, near)
        assert spectrum.residuals.shape == (near,)
        assert spectrum.matvecs == solver.matvecs - before  # of all the solves that it took
    # the second time it knew how many
    assert solver.solves <= 1 + math.ceil((near + 1) / 2) + 1


def test_an_edge_of_almost_nothing_has_converged_sooner() -> None:
    """λ_max ≈ 0 has no relative accuracy to reach: a residual of 1e-6 is enough."""
    h = crowd(80, 1.0, 0.9, 0.8)
    large, small = (
        WarmSolver(1, Solver(rtol=1e-9), StartVectors(0)).solve(edge_of(size * h, 1.0)).spectrum for size in (1e4, 1.0)
    )
    assert large.converged
    assert small.converged
    assert small.matvecs < large.matvecs
    assert float(large.residuals[0]) <= 1e-9 * 1e4
    assert 1e-9 < float(small.residuals[0]) <= 1e-6


def test_a_warm_solve_may_start_where_only_some_coordinates_have_a_threshold() -> None:
    h = crowd(40, 3.0, 1.0)
    c = np.where(np.arange(40) < 20, np.inf, 1.0)
    exact = np.linalg.eigvalsh(h[20:, 20:])[-1]
    solver = WarmSolver(1, Solver(rtol=1e-6), StartVectors(0))
    for _ in range(2):
        solution = solver.solve(edge_of(h, c))
        assert solution.top == pytest.approx(exact, rel=1e-6)
        assert not solution.mode[:20].any()


def test_the_same_curvature_twice_is_the_same_operator() -> None:
    net = Quadratic(symmetric())
    one = curvature(net, C, W)
    hessian = HessianOperator(net, loss_fn, [torch.zeros(1)])
    flipped = EdgeOperator(hessian, replace(one, sign=-1))
    assert np.allclose(dense(flipped) + dense(EdgeOperator(hessian, one)), 2 * np.diag(W / C), atol=1e-12)


def test_a_look_beyond_a_block_that_is_exact_takes_at_most_fourteen_products() -> None:
    """As the architecture page says; without a gap below the top the bound stays open."""
    n = 200
    h = np.diag(np.linspace(-1.0, 1.0, n))
    top = torch.zeros(n, 1, dtype=torch.float64)
    top[-1] = 1.0
    spectrum = WarmSolver(1, Solver(), StartVectors(0), top).solve(edge_of(h, 1.0)).spectrum
    assert float(spectrum.eigenvalues[0]) == pytest.approx(1.0)
    assert spectrum.converged
    assert 1 + 3 <= spectrum.matvecs <= 1 + 17


def test_residuals_are_relative_to_the_whole_where_nobody_says_otherwise() -> None:
    """An eigenvalue of 1 is as good as any."""
    for top in (1.0, 3.0):
        values = torch.tensor([top, *np.linspace(-0.5, 0.5, 80)], dtype=torch.float64)
        found = lanczos(lambda v, values=values: values * v, size=81, dtype=torch.float64, rtol=1e-3)
        assert found.converged
        assert found.matvecs < 15


def test_exact_finite_differences_are_solved_as_tightly_as_products() -> None:
    """Their error, some 1e-9 in double precision, is no excuse to stop a cold solve at 1e-2."""
    net = Quadratic(crowd(80, 1.0, 0.9))
    hessian = HessianOperator(net, loss_fn, [torch.zeros(1)], method="fd")
    step = hessian.calibrate(torch.ones(80, dtype=torch.float64))
    assert step.error < 1e-6
    spectrum = (
        WarmSolver(1, Solver(rtol=1e-2), StartVectors(0)).solve(EdgeOperator(hessian, curvature(net, 1.0))).spectrum
    )
    assert spectrum.converged
    assert float(spectrum.residuals[0]) <= 1e-4 * float(spectrum.eigenvalues[0])
