"""The basis of the eigen-solver, and what a solve leaves for the next, against NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eos_monitor.curvature.basis import Basis, dimension_of
from eos_monitor.curvature.lanczos import lanczos_recycled

N = 12
EPS = float(torch.finfo(torch.float64).eps)


def symmetric(seed: int = 0, n: int = N) -> Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a + a.T


class Operator:
    def __init__(self, a: Tensor) -> None:
        self.a = a
        self.size = len(a)
        self.dtype = a.dtype
        self.device = a.device
        self.calls = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.a @ v


def grown(a: Tensor, count: int, capacity: int = N) -> Basis:
    basis = Basis(Operator(a), len(a), capacity)
    for _ in range(count):
        assert basis.add(basis.random_vector())
    return basis


def rows(basis: Basis) -> Tensor:
    """The basis vectors: combinations with the unit matrix."""
    return basis.ritz_vectors(torch.eye(basis.count, dtype=torch.float64), basis.count)


def test_rows_are_orthonormal_and_ritz_pairs_those_of_the_projected_matrix() -> None:
    a = symmetric()
    basis = grown(a, 5)
    v = rows(basis).numpy()
    assert np.allclose(v @ v.T, np.eye(5), atol=1e-14)
    values, vectors = np.linalg.eigh(v @ a.numpy() @ v.T)
    theta, s = basis.rayleigh_ritz()
    assert np.allclose(theta.numpy(), values[::-1], atol=1e-13)
    ritz = basis.ritz_vectors(s, 3).numpy()
    assert np.allclose(np.abs(ritz @ v.T @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-12)
    residuals = basis.residuals(theta, s, 3).numpy()
    assert np.allclose(residuals, ritz @ a.numpy() - theta[:3, None].numpy() * ritz, atol=1e-13)


@pytest.mark.parametrize(("share", "taken"), [(50, False), (300, True)])
def test_a_vector_in_the_span_to_a_hundred_roundings_is_refused(share: float, taken: bool) -> None:
    basis = Basis(Operator(torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64))), N, N)
    one = torch.zeros(N, dtype=torch.float64)
    one[0] = 1.0
    assert basis.add(one)
    one[1] = share * EPS
    assert basis.add(one) is taken
    assert basis.count == (2 if taken else 1)
    if taken:  # it is made orthogonal all the same
        v = rows(basis).numpy()
        assert np.allclose(v @ v.T, np.eye(2), atol=1e-14)


def test_little_that_is_left_of_a_vector_is_orthogonal_to_rounding() -> None:
    basis = grown(symmetric(), 4)
    span = rows(basis).sum(0)
    assert basis.add(span + 1e-9 * basis.random_vector())
    v = rows(basis).numpy()
    assert np.allclose(v @ v.T, np.eye(5), atol=1e-14)


def test_what_has_no_direction_is_refused_without_a_product() -> None:
    operator = Operator(symmetric())
    basis = Basis(operator, N, N)
    assert not basis.add(torch.zeros(N, dtype=torch.float64))
    assert not basis.add(torch.full((N,), math.nan, dtype=torch.float64))
    assert (basis.count, operator.calls) == (0, 0)


def test_the_length_of_a_vector_does_not_matter() -> None:
    for length in (1e-30, 1.0, 1e30):
        basis = Basis(Operator(symmetric()), N, N)
        assert basis.add(length * torch.ones(N, dtype=torch.float64))
        assert torch.allclose(rows(basis)[0], torch.full((N,), N**-0.5, dtype=torch.float64))


def test_a_restart_keeps_the_leading_ritz_pairs_and_their_products() -> None:
    a = symmetric()
    basis = grown(a, 6)
    theta, s = basis.rayleigh_ritz()
    kept = basis.ritz_vectors(s, 3)
    basis.restart(s, keep=3)
    assert basis.count == 3
    after, _ = basis.rayleigh_ritz()
    assert torch.allclose(after, theta[:3], atol=1e-13)
    assert torch.allclose(rows(basis), kept, atol=1e-14)
    assert torch.allclose(basis.last_product(), a @ kept[2], atol=1e-13)
    assert basis.add(basis.random_vector())  # and it can go on
    v = rows(basis).numpy()
    values = np.linalg.eigvalsh(v @ a.numpy() @ v.T)[::-1]
    assert np.allclose(basis.rayleigh_ritz()[0].numpy(), values, atol=1e-13)


def test_what_is_left_of_the_last_product() -> None:
    a = symmetric()
    basis = grown(a, 4)
    v = rows(basis).numpy()
    w = a.numpy() @ v[3]
    expected = w - v.T @ (v @ w)
    rest, length = basis.remainder()
    assert np.allclose(rest.numpy(), expected, atol=1e-13)
    assert length == pytest.approx(np.linalg.norm(expected))
    assert torch.allclose(basis.last_product(), torch.tensor(w), atol=1e-13)


def test_the_recurrence_is_that_of_lanczos() -> None:
    """Beside two rows that are eigenvectors: what follows is Lanczos in their complement."""
    a = symmetric()
    vectors = np.linalg.eigh(a.numpy())[1]
    basis = Basis(Operator(a), N, N)
    for column in (0, 5):
        assert basis.add(torch.tensor(vectors[:, column]))
    z = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    direction = z
    lengths = []
    for _ in range(4):
        assert basis.add(direction)
        direction, length = basis.remainder()
        lengths.append(length)
    diagonal, beside = basis.recurrence(2)
    # the tridiagonal matrix in NumPy: QR of the Krylov vectors in the complement
    outside = np.delete(vectors, [0, 5], axis=1)
    inner = outside.T @ a.numpy() @ outside
    krylov = [outside.T @ z.numpy()]
    for _ in range(4):
        krylov.append(inner @ krylov[-1])
    q = np.linalg.qr(np.array(krylov).T)[0]
    t = q.T @ inner @ q
    assert np.allclose(diagonal, np.diag(t)[:4], atol=1e-9)
    assert np.allclose(beside, np.abs(np.diag(t, 1))[:3], atol=1e-9)
    assert np.allclose(lengths, np.abs(np.diag(t, 1))[:4], atol=1e-9)


def test_a_cleared_basis_begins_anew() -> None:
    basis = grown(symmetric(), 3)
    basis.clear()
    assert basis.count == 0
    assert basis.add(torch.ones(N, dtype=torch.float64))
    theta = float(basis.rayleigh_ritz()[0][0])
    assert theta == pytest.approx(float(symmetric().sum()) / N)


def test_seeds_and_sizes() -> None:
    a = symmetric()
    draws = [Basis(Operator(a), N, N, generator=g).random_vector() for g in (None, torch.Generator().manual_seed(0))]
    assert torch.equal(*draws)
    other = Basis(Operator(a), N, N, generator=torch.Generator().manual_seed(1)).random_vector()
    assert not torch.equal(draws[0], other)
    assert dimension_of(Operator(a), None) == N
    assert dimension_of(Operator(a), 3) == 3
    with pytest.raises(ValueError, match="Expected `size`"):
        dimension_of(lambda v: v, None)


# What a solve leaves for the next.


def recycled(values: list[float], start: Tensor | None = None, **settings: Any) -> Any:
    operator = Operator(torch.diag(torch.tensor(values, dtype=torch.float64)))
    given = {"k": 1, "rtol": 1e-8, "atol": 0.0, "max_matvecs": 200, "generator": torch.Generator().manual_seed(0)}
    return lanczos_recycled(operator, start, **(given | settings))


BULK = np.linspace(-1.0, -0.5, 40).tolist()


@pytest.mark.parametrize(
    ("top", "settings", "width"),
    [
        ([1.0, 0.86, 0.84], {}, 2),
        ([1.0, 0.86, 0.84], {"share": 0.8}, 3),
        ([1.0, 0.99, 0.98, 0.97, 0.96], {}, 4),
        ([1.0, 0.99, 0.98, 0.97, 0.96], {"width": 2}, 2),
        ([1.0, 0.2, 0.1], {"k": 3}, 3),
        ([-0.1, -0.11, -0.12], {}, 1),  # a share of a negative eigenvalue would be larger than it
    ],
)
def test_the_block_for_the_next_solve(top: list[float], settings: dict[str, Any], width: int) -> None:
    found = recycled(top + BULK, **settings)
    assert found.block.shape == (len(top) + 40, width)
    leading = np.abs(found.block.numpy()[: len(top)])
    k = settings.get("k", 1)
    assert np.allclose(leading[:k, :k], np.eye(k), atol=1e-6)
    # the scout is the Ritz vector that comes next, apart from the block
    assert float(found.scout.norm()) == pytest.approx(1.0)
    assert np.allclose(found.scout.numpy() @ found.block.numpy(), 0.0, atol=1e-12)
    assert found.open == 0.0  # nobody looked beyond


def test_there_is_no_scout_where_the_block_is_all() -> None:
    found = recycled([3.0, 2.0], k=2)
    assert found.block.shape == (2, 2)
    assert found.scout is None


@pytest.mark.parametrize("budget", [None, 3])
def test_a_budget_bounds_the_products_of_a_solve(budget: int | None) -> None:
    found = recycled([1.0, 0.999, *BULK], budget=budget, rtol=1e-12)
    assert found.spectrum.converged is (budget is None)
    assert found.spectrum.matvecs == 3 if budget else found.spectrum.matvecs > 3


@pytest.mark.parametrize(("shift", "converged"), [(0.0, True), (0.9999, False)])
def test_residuals_are_relative_to_the_distance_from_the_shift(shift: float, converged: bool) -> None:
    """Where decay has most of an eigenvalue, a hundredth of the whole is all of the Hessian's part."""
    start = torch.zeros(42, 1, dtype=torch.float64)
    start[0] = 1.0
    start[1] = 1e-3
    found = recycled([1.0, 0.5, *BULK], start, rtol=1e-2, shift=shift, max_matvecs=1)
    assert float(found.spectrum.residuals[0]) == pytest.approx(5e-4, rel=1e-2)
    assert found.spectrum.converged is converged


def test_twenty_vectors_are_kept() -> None:
    """A basis of 20 needs little more than Lanczos without restarts; one of 6 needs several times as much."""
    n = 400
    values = np.concatenate([[1.0, 0.97], np.linspace(-1.0, 0.93, n - 2)])
    operator = Operator(torch.diag(torch.tensor(values)))
    start = np.random.default_rng(0).standard_normal(n)
    found = recycled(values.tolist(), torch.tensor(start)[:, None], rtol=1e-4)
    assert found.spectrum.converged
    # Lanczos in NumPy, fully orthogonalized
    v = [start / np.linalg.norm(start)]
    while True:
        basis = np.array(v)
        theta, s = np.linalg.eigh(basis @ (values * basis).T)
        ritz = s[:, -1] @ basis
        rest = values * ritz - theta[-1] * ritz
        if np.linalg.norm(rest) <= 1e-4 * theta[-1]:
            break
        rest -= basis.T @ (basis @ rest)
        rest -= basis.T @ (basis @ rest)
        v.append(rest / np.linalg.norm(rest))
    assert operator.size == n
    assert len(v) > 20
    assert found.spectrum.matvecs <= 1.2 * len(v)
