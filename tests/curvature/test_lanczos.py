"""The eigen-solver against spectra that are known because the matrices are built from them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eos_monitor import Spectrum, lanczos
from eos_monitor.curvature.audit import Audit, largest_possible
from eos_monitor.curvature.lanczos import lanczos_recycled


def matrix(spectrum: Tensor, seed: int = 0) -> Tensor:
    """Symmetric matrix with this spectrum in a random orthonormal basis."""
    g = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    return q @ torch.diag(spectrum.double()) @ q.T


class Counting:
    """Operator that counts its products."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.calls = a, 0
        self.size, self.dtype, self.device = len(a), a.dtype, a.device

    def matvec(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.a @ v


def outliers(n: int, *top: float, low: float = -0.5, high: float = 0.5) -> Tensor:
    return torch.cat([torch.tensor(top, dtype=torch.float64), torch.linspace(low, high, n - len(top)).double()])


SPECTRA: dict[str, Tensor] = {
    "outliers": outliers(150, 5.0, 3.0, 2.0, 1.0),
    "no-gap": torch.linspace(-1, 1, 120, dtype=torch.float64),
    "crowded-top": outliers(150, 1.0, 0.999, 0.998, 0.997, 0.996),
    "negative-larger": outliers(150, 2.0, 1.5, 1.0, 0.9, low=-9.0, high=0.5),
    "all-negative": -torch.linspace(1, 5, 60, dtype=torch.float64),
    "power-law": 1 / torch.arange(1, 151, dtype=torch.float64) ** 1.5,
    "tiny-scale": 1e-9 * outliers(150, 5.0, 3.0, 2.0, 1.0),
    "large-scale": 1e9 * outliers(150, 5.0, 3.0, 2.0, 1.0),
}


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", SPECTRA)
def test_finds_the_largest_algebraic_eigenvalues(name: str, k: int) -> None:
    spectrum = SPECTRA[name]
    operator = Counting(matrix(spectrum))
    found = lanczos(operator, k=k, rtol=1e-8, max_matvecs=2000)
    exact = spectrum.sort(descending=True).values[:k]
    assert found.converged
    # An eigenvalue is off by at most its residual, 1e-8 |θ|; rounding is u·‖A‖ ≈ 1e-15 of the largest magnitude.
    torch.testing.assert_close(found.eigenvalues, exact, rtol=1e-8, atol=1e-14 * float(spectrum.abs().max()))


@pytest.mark.parametrize("name", ["outliers", "no-gap", "crowded-top", "negative-larger"])
def test_vectors_are_orthonormal_and_residuals_true(name: str) -> None:
    a = matrix(SPECTRA[name])
    found = lanczos(Counting(a), k=4, rtol=1e-3, max_matvecs=500)
    v, theta = found.eigenvectors, found.eigenvalues
    # Reorthogonalized twice in double precision: a few u; a restart multiplies by orthogonal matrices.
    torch.testing.assert_close(v.T @ v, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    residuals = torch.linalg.vector_norm(a @ v - v * theta, dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-6, atol=1e-13)
    assert bool((residuals <= 1e-3 * theta.abs()).all())


@pytest.mark.parametrize("max_matvecs", [4, 19, 20, 21, 64, 500])
@pytest.mark.parametrize("name", ["outliers", "no-gap", "crowded-top"])
def test_counts_products_exactly_and_keeps_the_bound(name: str, max_matvecs: int) -> None:
    operator = Counting(matrix(SPECTRA[name]))
    found = lanczos(operator, k=4, rtol=1e-10, max_matvecs=max_matvecs)
    assert found.matvecs == operator.calls <= max_matvecs
    assert found.converged or found.matvecs == max_matvecs


def test_unconverged_is_no_error_and_a_lower_bound() -> None:
    operator = Counting(matrix(SPECTRA["no-gap"]))
    found = lanczos(operator, rtol=1e-6, max_matvecs=5)
    assert not found.converged
    assert found.matvecs == 5
    assert found.residuals[0] > 1e-6 * found.eigenvalues[0]
    assert found.eigenvalues[0] < 1.0  # a Ritz value never exceeds the largest eigenvalue


def test_restarts_beyond_twenty_vectors() -> None:
    """With one outlier barely above a dense bulk a basis of 20 vectors must be restarted many times."""
    spectrum = outliers(400, 1.02, low=-1.0, high=1.0)
    operator = Counting(matrix(spectrum))
    found = lanczos(operator, rtol=1e-9, max_matvecs=1000)
    assert found.converged
    assert found.matvecs > 60
    assert float(found.eigenvalues[0]) == pytest.approx(1.02, rel=1e-9)


def test_is_lanczos_from_one_start_vector() -> None:
    """The Ritz values after m products are those of the Krylov space, whose exact value is computed apart."""
    a, n, m = matrix(SPECTRA["outliers"]), 150, 7
    start = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    krylov = [start / start.norm()]
    for _ in range(m - 1):
        krylov.append(a @ krylov[-1] / torch.linalg.vector_norm(a @ krylov[-1]))
    q = torch.linalg.qr(torch.stack(krylov, dim=1))[0]
    ritz = torch.linalg.eigvalsh(q.T @ a @ q).flip(0)
    found = lanczos(Counting(a), k=2, v0=start, rtol=0.0, max_matvecs=m)
    # The power basis has a condition of about 1e5 here, so its span is good to 1e-11.
    torch.testing.assert_close(found.eigenvalues, ritz[:2], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-4])
def test_rtol_bounds_the_relative_residual(rtol: float) -> None:
    found = lanczos(Counting(matrix(SPECTRA["power-law"])), k=2, rtol=rtol)
    assert found.converged
    assert bool((found.residuals <= rtol * found.eigenvalues.abs()).all())


def test_looser_rtol_spends_fewer_products() -> None:
    spent = [lanczos(Counting(matrix(SPECTRA["no-gap"])), rtol=r, max_matvecs=500).matvecs for r in (1e-1, 1e-3, 1e-6)]
    assert spent == sorted(set(spent))


def test_atol_accepts_an_eigenvalue_near_zero() -> None:
    """λ_max = 0 has no relative accuracy: without ``atol`` the products are spent."""
    spectrum = -torch.cat([torch.zeros(1), torch.linspace(1e-3, 1, 99)]).double()
    without = lanczos(Counting(matrix(spectrum)), rtol=1e-2, max_matvecs=40)
    found = lanczos(Counting(matrix(spectrum)), rtol=1e-2, atol=1e-2, max_matvecs=40)
    assert not without.converged
    assert found.converged
    assert float(found.residuals[0]) <= 1e-2
    assert abs(float(found.eigenvalues[0])) <= 1e-2


INVARIANT: dict[str, tuple[Tensor, int, list[float]]] = {
    "identity": (torch.eye(30), 1, [1.0]),
    "identity-k3": (torch.eye(30), 3, [1.0, 1.0, 1.0]),
    "identity-k25": (torch.eye(30), 25, [1.0] * 25),
    "zero": (torch.zeros(30, 30), 1, [0.0]),
    "zero-k3": (torch.zeros(30, 30), 3, [0.0, 0.0, 0.0]),
    "rank-one": (torch.ones(32, 32) / 32 * 7, 1, [7.0]),
    "rank-one-k3": (torch.ones(32, 32) / 32 * 7, 3, [7.0, 0.0, 0.0]),
    "minus-rank-one": (torch.ones(32, 32) / 32 * -7, 1, [0.0]),
    "two-values": (torch.diag(torch.tensor([2.0] + [1.0] * 29)), 2, [2.0, 1.0]),
}


@pytest.mark.parametrize("name", INVARIANT)
def test_invariant_subspaces(name: str) -> None:
    """Krylov spaces that end early: the search goes on from random vectors, and ends."""
    a, k, exact = INVARIANT[name]
    operator = Counting(a.double())
    found = lanczos(operator, k=k, rtol=1e-8, atol=1e-12, max_matvecs=64)
    assert found.converged
    assert found.matvecs == operator.calls
    torch.testing.assert_close(found.eigenvalues, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (5, 5), (30, 30), (45, 44)], ids=str)
def test_whole_spectrum(n: int, k: int) -> None:
    spectrum = torch.linspace(-2, 3, n, dtype=torch.float64)
    found = lanczos(Counting(matrix(spectrum)), k=k, rtol=1e-10, max_matvecs=4 * n)
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, spectrum.flip(0)[:k], rtol=0, atol=1e-10)


def test_size_one_needs_one_product() -> None:
    found = lanczos(lambda v: -3.0 * v, size=1)
    assert (found.eigenvalues.tolist(), found.matvecs, found.converged) == ([-3.0], 1, True)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_start_block_as_wide_as_the_space(n: int) -> None:
    a = matrix(torch.linspace(-2, 3, n, dtype=torch.float64))
    found = lanczos(Counting(a), v0=torch.eye(n, dtype=torch.float64), rtol=1e-10)
    assert found.converged
    assert found.matvecs <= n
    assert float(found.eigenvalues[0]) == pytest.approx(float(torch.linalg.eigvalsh(a)[-1]), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_product_that_is_not_finite_raises(value: float) -> None:
    with pytest.raises(RuntimeError, match="Expected finite matrix-vector products, got NaN or infinity"):
        lanczos(lambda v: v * value, size=5)


def test_later_product_that_is_not_finite_raises() -> None:
    a, calls = matrix(SPECTRA["no-gap"]), [0]

    def matvec(v: Tensor) -> Tensor:
        calls[0] += 1
        return a @ v if calls[0] < 4 else torch.full_like(v, math.nan)

    with pytest.raises(RuntimeError, match="Expected finite"):
        lanczos(matvec, size=120, dtype=torch.float64, rtol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": None}, "Expected `size` for a plain function, got None"),
        ({"k": 0}, "Expected 1 <= `k` <= size = 5, got 0"),
        ({"k": 6}, "Expected 1 <= `k` <= size = 5, got 6"),
        ({"rtol": -1e-3}, "Expected `rtol` >= 0 and `atol` >= 0, got -0.001 and 0.0"),
        ({"atol": -1.0}, "Expected `rtol` >= 0 and `atol` >= 0, got 0.0001 and -1.0"),
        ({"rtol": math.nan}, "Expected `rtol` >= 0"),
        ({"k": 3, "max_matvecs": 2}, "Expected `max_matvecs` >= k = 3, got 2"),
        ({"v0": torch.ones(4)}, r"Expected `v0` of shape \(5,\) or \(5, j\), got \(4,\)"),
        ({"v0": torch.ones(2, 5)}, r"Expected `v0` of shape \(5,\) or \(5, j\), got \(2, 5\)"),
        ({"v0": torch.ones(5, 0)}, r"Expected `v0` of shape"),
        ({"v0": torch.ones(5, 1, 1)}, r"Expected `v0` of shape"),
    ],
    ids=["size", "k-zero", "k-large", "rtol", "atol", "nan", "max_matvecs", "v0", "v0-rows", "v0-empty", "v0-3d"],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lanczos(lambda v: v, **({"size": 5} | arguments))


def test_exact_block_converges_in_its_own_products() -> None:
    a = matrix(SPECTRA["crowded-top"])
    block = torch.linalg.eigh(a)[1].flip(1)[:, :4]
    found = lanczos(Counting(a), k=4, v0=block, rtol=1e-10)
    assert found.converged
    assert found.matvecs == 4


@pytest.mark.parametrize("shape", [(150,), (150, 1)], ids=str)
def test_single_start_vector_in_both_shapes(shape: tuple[int, ...]) -> None:
    a = matrix(SPECTRA["outliers"])
    top = torch.linalg.eigh(a)[1][:, -1]
    assert lanczos(Counting(a), v0=top.reshape(shape), rtol=1e-10).matvecs == 1


def test_start_on_another_eigenvector_stays_there() -> None:
    """What the docstring warns of: a residual does not certify the top."""
    a = matrix(SPECTRA["outliers"])
    second = torch.linalg.eigh(a)[1][:, -2]
    found = lanczos(Counting(a), v0=second, rtol=1e-10)
    assert found.converged
    assert float(found.eigenvalues[0]) == pytest.approx(3.0, rel=1e-9)


BLOCKS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "dependent-columns": (lambda v: torch.stack([v, 2 * v, -v], dim=1), 1),
    "zero-column": (lambda v: torch.stack([v, torch.zeros_like(v)], dim=1), 1),
    "nan-column": (lambda v: torch.stack([v, torch.full_like(v, math.nan)], dim=1), 1),
    "inf-column": (lambda v: torch.stack([torch.full_like(v, math.inf), v], dim=1), 1),
    "float32": (lambda v: v.float(), 1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_unusable_columns_cost_no_product(name: str) -> None:
    a = matrix(SPECTRA["outliers"])
    build, products = BLOCKS[name]
    operator = Counting(a)
    # float32 start vectors are exact eigenvectors to 1e-7 only.
    found = lanczos(operator, v0=build(torch.linalg.eigh(a)[1][:, -1]), rtol=1e-5)
    assert found.converged
    assert found.matvecs == operator.calls == products


def test_columns_that_depend_to_rounding_cost_no_product() -> None:
    a = matrix(SPECTRA["outliers"])
    first, second = torch.linalg.eigh(a)[1].flip(1)[:, :2].T
    found = lanczos(Counting(a), k=2, v0=torch.stack([first, second, 0.3 * first + 0.7 * second], dim=1), rtol=1e-8)
    assert found.converged
    assert found.matvecs == 2


@pytest.mark.parametrize("value", [0.0, math.nan], ids=str)
def test_useless_start_is_replaced_by_a_random_one(value: float) -> None:
    found = lanczos(Counting(matrix(SPECTRA["outliers"])), v0=torch.full((150,), value), rtol=1e-6)
    assert found.converged
    assert float(found.eigenvalues[0]) == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize(("columns", "bound"), [(30, 64), (10, 4)], ids=["over-basis", "over-products"])
def test_block_larger_than_what_fits_is_cut(columns: int, bound: int) -> None:
    operator = Counting(matrix(SPECTRA["no-gap"]))
    block = torch.randn(120, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = lanczos(operator, v0=block, rtol=1e-12, max_matvecs=bound)
    assert found.matvecs == operator.calls == bound


def test_block_finds_every_copy_of_a_repeated_eigenvalue() -> None:
    """A Krylov space from one vector holds one direction of each eigenspace; a block of four holds four."""
    a = matrix(outliers(100, 3.0, 3.0, 3.0, 2.0))
    block = torch.randn(100, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = lanczos(Counting(a), k=4, v0=block, rtol=1e-9, max_matvecs=500)
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, torch.tensor([3.0, 3.0, 3.0, 2.0]).double(), rtol=1e-9, atol=0.0)


def test_seed_decides_the_start() -> None:
    def run(generator: torch.Generator | None) -> Spectrum:
        return lanczos(Counting(matrix(SPECTRA["no-gap"])), rtol=1e-2, generator=generator)

    def seeded(seed: int) -> Spectrum:
        return run(torch.Generator().manual_seed(seed))

    assert torch.equal(seeded(0).eigenvectors, run(None).eigenvectors)
    assert torch.equal(seeded(7).eigenvectors, seeded(7).eigenvectors)
    assert not torch.equal(seeded(7).eigenvectors, seeded(8).eigenvectors)


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    lanczos(Counting(torch.eye(30)), k=3)  # draws replacements too
    assert torch.equal(torch.get_rng_state(), before)


def test_given_generator_advances() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    lanczos(Counting(torch.eye(30)), generator=generator)
    assert not torch.equal(generator.get_state(), before)


def test_function_defaults_to_float32_and_results_to_float64() -> None:
    seen = []

    def matvec(v: Tensor) -> Tensor:
        seen.append((v.dtype, v.shape))
        return 2 * v

    found = lanczos(matvec, size=6, k=2)
    assert set(seen) == {(torch.float32, torch.Size([6]))}
    assert (found.eigenvectors.dtype, found.eigenvectors.shape) == (torch.float32, (6, 2))
    assert found.eigenvalues.dtype == found.residuals.dtype == torch.float64
    assert found.eigenvalues.shape == found.residuals.shape == (2,)


def test_arguments_win_over_the_operator() -> None:
    found = lanczos(Counting(torch.eye(8).double()).matvec, size=8, dtype=torch.float64, device="cpu")
    assert found.eigenvectors.dtype == torch.float64


def test_float32_reaches_its_own_precision() -> None:
    spectrum = SPECTRA["outliers"]
    found = lanczos(Counting(matrix(spectrum).float()), k=4, rtol=1e-5)
    assert found.converged
    # θ is a quotient of float32 products: a few hundred u of ‖A‖, n = 150.
    torch.testing.assert_close(found.eigenvalues, spectrum[:4], rtol=1e-5, atol=0.0)


def test_rtol_below_rounding_ends_with_the_products() -> None:
    found = lanczos(Counting(matrix(SPECTRA["outliers"]).float()), rtol=1e-12, max_matvecs=50)
    assert not found.converged
    assert found.matvecs == 50
    assert float(found.eigenvalues[0]) == pytest.approx(5.0, rel=1e-5)


def test_result_is_frozen() -> None:
    found = lanczos(lambda v: v, size=3)
    with pytest.raises(AttributeError):
        found.converged = False  # type: ignore[misc]


RECYCLED: dict[str, tuple[list[float], int, int]] = {
    # top of the spectrum, k -> width of the block
    "isolated": ([10.0, 2.0, 1.0], 1, 1),
    "pair": ([10.0, 9.0, 1.0], 1, 2),
    "at-most-four": ([10.0, 9.9, 9.8, 9.7, 9.6, 9.5], 1, 4),
    "at-least-k": ([10.0, 2.0, 1.0], 3, 3),
    "k-over-width": ([10.0, 9.9, 9.8, 9.7, 9.6, 9.5], 6, 6),
    "nothing-positive": ([-1.0, -1.001], 1, 1),
}


@pytest.mark.parametrize("name", RECYCLED)
def test_recycled_block_holds_the_crowd_at_the_top(name: str) -> None:
    top, k, width = RECYCLED[name]
    spectrum = outliers(80, *top, low=-3.0, high=-2.0)
    operator = Counting(matrix(spectrum))
    arguments = {"k": k, "rtol": 1e-8, "atol": 0.0, "max_matvecs": 200, "generator": torch.Generator().manual_seed(0)}
    first = lanczos_recycled(operator, None, **arguments)
    found, block = first.spectrum, first.block
    assert found.converged
    assert block.shape == (80, width)
    torch.testing.assert_close(block.T @ block, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    again = lanczos_recycled(operator, block, **arguments).spectrum
    assert again.converged
    assert again.matvecs <= width + 2 * k
    torch.testing.assert_close(again.eigenvalues, found.eigenvalues, rtol=1e-8, atol=0.0)


def test_recycled_block_follows_a_crossing() -> None:
    """The second eigenvalue overtakes the first between two solves: a block sees it, a single vector cannot."""
    q = torch.linalg.qr(torch.randn(80, 80, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
    before, after = outliers(80, 1.0, 0.97), outliers(80, 0.97, 1.0)
    arguments = {"k": 1, "rtol": 1e-4, "atol": 0.0, "max_matvecs": 64, "generator": torch.Generator().manual_seed(0)}
    block = lanczos_recycled(Counting(q @ torch.diag(before) @ q.T), None, **arguments).block
    moved = Counting(q @ torch.diag(after) @ q.T)
    found = lanczos_recycled(moved, block, **arguments).spectrum
    assert float(found.eigenvalues[0]) == pytest.approx(1.0, rel=1e-4)
    assert found.matvecs <= 6
    alone = lanczos(moved, v0=q[:, 0], rtol=1e-4)
    assert float(alone.eigenvalues[0]) == pytest.approx(0.97, rel=1e-4)


def audit(n: int, seed: int = 5, **settings: Any) -> Audit:
    start = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Audit(start, **{"share": 1 / n, "least": 3, "most": 14, "rtol": 5e-3, "atol": 0.0} | settings)


@pytest.mark.parametrize("looks", [False, True])
def test_an_audit_finds_what_the_block_has_no_share_of(looks: bool) -> None:
    """The block's own pair has converged; without products along another vector nothing else is seen."""
    q = torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
    operator = Counting(q @ torch.diag(outliers(200, 1.0, 2.0, low=-0.9, high=0.9)) @ q.T)
    arguments = {"k": 1, "rtol": 1e-3, "atol": 0.0, "max_matvecs": 64, "generator": torch.Generator().manual_seed(0)}
    found = lanczos_recycled(operator, q[:, :1], audit=lambda *_: audit(200) if looks else None, **arguments).spectrum
    assert found.matvecs == operator.calls
    assert float(found.eigenvalues[0]) == pytest.approx(2.0 if looks else 1.0, rel=1e-3)


def test_an_audit_keeps_the_bound_on_products_and_says_that_it_was_cut_short() -> None:
    operator = Counting(matrix(SPECTRA["no-gap"]))
    top = torch.linalg.eigh(operator.a)[1][:, -1:]
    arguments = {"k": 1, "rtol": 1e-6, "atol": 0.0, "generator": torch.Generator().manual_seed(0)}
    for most, converged in ((2, False), (5, True)):
        operator.calls = 0
        found = lanczos_recycled(operator, top, audit=lambda *_: audit(120), max_matvecs=most, **arguments)
        assert found.spectrum.matvecs == operator.calls == most
        assert found.spectrum.converged is converged


@pytest.mark.parametrize("seed", range(20))
def test_what_an_audit_leaves_open_holds_what_it_did_not_find(seed: int) -> None:
    """A coordinate of exactly its typical share, and an audit of one product: it must not be excluded."""
    n = 300
    g = torch.Generator().manual_seed(seed)
    diagonal = torch.rand(n, generator=g, dtype=torch.float64)
    diagonal[0] = 1.0
    diagonal[1] = 3.0
    z = torch.randn(n, generator=g, dtype=torch.float64)
    z[0] = 0.0
    z[1] = 0.0
    z[1] = z.norm() / math.sqrt(n - 1)
    found = lanczos_recycled(
        Counting(torch.diag(diagonal)),
        torch.eye(n, 1, dtype=torch.float64),
        k=1,
        rtol=1e-2,
        atol=0.0,
        max_matvecs=64,
        generator=g,
        audit=lambda *_: Audit(z, 1 / n, least=1, most=1, rtol=5e-3, atol=0.0),
    )
    assert float(found.spectrum.eigenvalues[0]) == pytest.approx(1.0)
    assert float(found.spectrum.eigenvalues[0]) + found.open >= 3.0


def test_the_largest_possible_eigenvalue_of_a_recurrence_in_closed_form() -> None:
    # (v'z)² (1 + (x − α)² / β²) = 1
    assert largest_possible([2.0], [0.5], 0.01) == pytest.approx(2.0 + 0.5 * math.sqrt(99.0))
    assert largest_possible([2.0], [0.0], 0.01) == -math.inf


def test_the_default_stop_finds_the_top_of_a_close_pair() -> None:
    """At 1e-2 a public call sat on the second of two eigenvalues 3.4 % apart, converged; see `readings` for more."""
    spectrum = outliers(2000, 1.0, 0.965, low=-0.3, high=0.3)
    for seed in range(20):
        found = lanczos(
            lambda v: spectrum * v, size=2000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        assert found.converged
        assert float(found.eigenvalues[0]) == pytest.approx(1.0, rel=1e-4)


class TF32(TorchDispatchMode):
    """Rounds the inputs of matrix-matrix products to 10 bits, as an accelerator does where its flags allow TF32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            args = [tf32(a) if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in args]
        return func(*args, **(kwargs or {}))


def tf32(a: Tensor) -> Tensor:
    return ((a.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("seed", range(3))
def test_the_solver_is_exact_whatever_the_tf32_flags(seed: int) -> None:
    diagonal = torch.cat([torch.tensor([1.0, 0.9]), torch.linspace(-0.5, 0.7, 1998)])
    with TF32():
        assert float(torch.eye(1)[0] @ torch.tensor([1 / 3])) == pytest.approx(1 / 3, abs=1e-8)
        assert float(torch.full((1, 1), 1 / 3) @ torch.eye(1)) != pytest.approx(1 / 3, abs=1e-5)
        found = lanczos(
            lambda v: diagonal * v, size=2000, k=2, rtol=1e-5, generator=torch.Generator().manual_seed(seed)
        )
    assert found.converged
    assert found.matvecs > 20  # through a restart
    assert found.eigenvalues.tolist() == pytest.approx([1.0, 0.9], rel=1e-5)
