"""The bound of an audit and what it finds behind a start block, against NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eos_monitor.curvature.audit import Audit, largest_possible, look_beyond
from eos_monitor.curvature.basis import Basis
from eos_monitor.curvature.lanczos import lanczos_recycled
from tests.curvature.test_basis import N, Operator, symmetric


def largest_by_roots(diagonal: list[float], beside: list[float], share: float) -> float:
    """The largest root of share · Σ pᵢ(x)² = 1, of polynomials written out, or the largest Ritz value above it."""
    x = np.polynomial.Polynomial([0.0, 1.0])
    before, now = 0.0 * x, 0.0 * x + 1.0
    total = now * now
    previous = 0.0
    for a, b in zip(diagonal, beside, strict=True):
        before, now = now, ((x - a) * now - previous * before) / b
        previous = b
        total = total + now * now
    roots = (share * total - 1.0).roots()
    t = np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    return float(max([np.linalg.eigvalsh(t)[-1], *(root.real for root in roots if abs(root.imag) < 1e-9)]))


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("share", [0.2, 1e-2, 1e-6])
def test_the_largest_possible_eigenvalue_is_a_root(m: int, share: float) -> None:
    rng = np.random.default_rng(m)
    diagonal = rng.standard_normal(m).tolist()
    beside = (0.2 + rng.random(m)).tolist()
    assert largest_possible(diagonal, beside, share) == pytest.approx(
        largest_by_roots(diagonal, beside, share), rel=1e-6
    )


def test_an_invariant_space_leaves_nothing_open() -> None:
    assert largest_possible([1.0, 2.0], [0.5, 0.0], 0.1) == -math.inf


@pytest.mark.parametrize("seed", range(5))
def test_no_eigenvalue_of_the_stated_share_lies_above_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.sort(rng.standard_normal(30))
    z = rng.standard_normal(30)
    share = float(z[-1] ** 2 / (z @ z))
    basis = Basis(Operator(torch.diag(torch.tensor(values))), 30, 20)
    audit = Audit(torch.tensor(z), share, least=4, most=4, rtol=0.0, atol=0.0)
    bound, spent = look_beyond(basis, audit, 1)
    assert spent == 4
    assert bound >= values[-1] * (1 - 1e-12)
    # with a far larger share than it has, the eigenvalue is excluded from where it is or below
    basis = Basis(Operator(torch.diag(torch.tensor(values))), 30, 20)
    tighter, _ = look_beyond(basis, Audit(torch.tensor(z), 100 * share, least=4, most=4, rtol=0.0, atol=0.0), 1)
    assert tighter < bound


@pytest.mark.parametrize(
    ("theta", "k", "rtol", "atol", "expected"),
    [
        ([4.0, 2.0, 1.0], 1, 0.1, 0.0, 4.4),
        ([4.0, 2.0, 1.0], 2, 0.1, 0.0, 2.4),
        ([4.0, 2.0, 1.0], 2, 0.1, 0.5, 2.5),
        ([4.0, 2.0], 5, 0.1, 0.0, 2.4),
        ([-4.0, -5.0], 1, 0.1, 0.0, -3.6),
    ],
)
def test_what_is_enough_is_the_last_eigenvalue_and_a_share_of_the_first(
    theta: list[float], k: int, rtol: float, atol: float, expected: float
) -> None:
    audit = Audit(torch.ones(1), 0.1, 1, 1, rtol, atol)
    assert audit.enough(torch.tensor(theta, dtype=torch.float64), k) == pytest.approx(expected)


@pytest.mark.parametrize(("least", "most"), [(3, 14), (6, 14), (3, 5), (1, 1)])
def test_an_audit_spends_no_less_and_no_more(least: int, most: int) -> None:
    """All that is left is close to 0 and the top is 1: four products exclude the rest to a thousandth of its share."""
    values = torch.linspace(-0.001, 0.001, 60, dtype=torch.float64)
    values[0] = 1.0
    operator = Operator(torch.diag(values))
    basis = Basis(operator, 60, 20)
    assert basis.add(torch.eye(60, dtype=torch.float64)[0])
    z = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bound, spent = look_beyond(basis, Audit(z, 1 / 60, least, most, 5e-3, 0.0), 1)
    assert spent == operator.calls - 1
    assert spent == min(most, max(least, 3))
    assert bound < 1.005


def test_an_audit_along_what_the_basis_holds_says_that_there_is_nothing() -> None:
    basis = Basis(Operator(symmetric()), N, N)
    z = torch.ones(N, dtype=torch.float64)
    assert basis.add(z)
    assert look_beyond(basis, Audit(z, 0.1, 3, 14, 0.0, 0.0), 1) == (-math.inf, 0)


# Looking beyond a start block of several vectors.


def hidden(columns: int) -> tuple[Operator, Tensor, Tensor]:
    """A top of 1 that has converged, and a larger one, 3, behind a start vector that looks harmless by its value.

    The last column is (e₁ + e₂)/√2, of value 0.05 and residual 2.95; the vector of the audit has no part there.
    """
    values = torch.linspace(-0.2, 0.2, 60, dtype=torch.float64)
    values[:3] = torch.tensor([1.0, 3.0, -2.9])
    eye = torch.eye(60, dtype=torch.float64)
    block = torch.stack([eye[0], *(eye[50 + i] for i in range(columns - 2)), (eye[1] + eye[2]) / math.sqrt(2.0)], 1)
    z = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:3] = 0.0
    return Operator(torch.diag(values)), block, z


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_what_a_start_vector_hides_is_found_and_its_products_counted(columns: int) -> None:
    operator, block, z = hidden(columns)
    given = {"k": 1, "rtol": 1e-8, "atol": 0.0, "max_matvecs": 64, "generator": torch.Generator().manual_seed(0)}
    assert float(lanczos_recycled(operator, block, **given).spectrum.eigenvalues[0]) == pytest.approx(1.0)
    operator.calls = 0
    found = lanczos_recycled(operator, block, audit=lambda *_: Audit(z, 1 / 60, 3, 14, 5e-3, 0.0), **given)
    assert float(found.spectrum.eigenvalues[0]) == pytest.approx(3.0)
    assert found.spectrum.converged
    assert found.spectrum.matvecs == operator.calls


@pytest.mark.parametrize("most", [3, 4, 5, 6])
def test_and_no_more_than_the_bound(most: int) -> None:
    operator, block, z = hidden(3)
    given = {"k": 1, "rtol": 1e-8, "atol": 0.0, "max_matvecs": most, "generator": torch.Generator().manual_seed(0)}
    found = lanczos_recycled(operator, block, audit=lambda *_: Audit(z, 1 / 60, 3, 14, 5e-3, 0.0), **given)
    assert found.spectrum.matvecs == operator.calls <= most
    assert not found.spectrum.converged


def test_what_is_open_is_the_bound_over_the_last_eigenvalue() -> None:
    """One product along z: α and β of its part beside e₀, and the bound α + β √(1/share − 1)."""
    values = np.linspace(0.2, 0.6, 40)
    values[0] = 1.0
    values[1] = 0.9
    z = np.random.default_rng(0).standard_normal(40)
    for k, top in ((1, 1.0), (2, 0.9)):
        rest = z.copy()
        rest[:k] = 0.0
        rest /= np.linalg.norm(rest)
        alpha = rest @ (values * rest)
        beta = np.linalg.norm(values * rest - alpha * rest)
        operator = Operator(torch.diag(torch.tensor(values)))
        found = lanczos_recycled(
            operator,
            torch.eye(40, k, dtype=torch.float64),
            k=k,
            rtol=1e-3,
            atol=0.0,
            max_matvecs=64,
            generator=torch.Generator().manual_seed(0),
            audit=lambda *_: Audit(torch.tensor(z), 1e-3, 1, 1, 5e-3, 0.0),
        )
        assert found.open == pytest.approx(alpha + beta * math.sqrt(999.0) - top, rel=1e-6)
        assert found.spectrum.matvecs == operator.calls == k + 1


def test_a_full_basis_makes_room_for_an_audit() -> None:
    """A solve that has taken 18 of 20 places: the audit has its products all the same, and says what is open."""
    values = torch.linspace(0.0, 1.0, 200, dtype=torch.float64)
    operator = Operator(torch.diag(values))
    before = []

    def audit(spectrum: Any, inside: bool, leak: float) -> Audit:
        before.append(spectrum.matvecs)
        z = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return Audit(z, 1 / 200, 10, 10, 0.0, 0.0)

    found = lanczos_recycled(
        operator,
        None,
        k=1,
        rtol=0.01,
        atol=0.0,
        max_matvecs=200,
        generator=torch.Generator().manual_seed(0),
        audit=audit,
    )
    assert before[0] >= 12
    assert found.spectrum.matvecs == operator.calls >= before[0] + 10
    assert 0.0 <= found.open < 0.5
    assert 0.99 <= float(found.spectrum.eigenvalues[0]) <= 1.0
