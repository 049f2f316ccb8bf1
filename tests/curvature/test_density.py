"""The spectral density against matrices whose whole spectrum is known."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from eos_monitor import HessianOperator, spectral_density
from eos_monitor.curvature.density import SpectralDensity
from tests.nets import dense_hessian, make

SEEDS = 200
PROBES = 8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotated(spectrum: Tensor, seed: int = 0) -> Tensor:
    n = len(spectrum)
    q = torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64))[0]
    return q @ torch.diag(spectrum.double()) @ q.T


def random_symmetric(n: int) -> Tensor:
    a = torch.randn(n, n, generator=seeded(1), dtype=torch.float64)
    return (a + a.T) / 2


@cache
def matrix(name: str) -> Tensor:
    if name == "random":
        return random_symmetric(120)
    if name == "outlier":
        return rotated(torch.cat([torch.tensor([40.0]), torch.linspace(-0.5, 1.0, 119)]))
    if name == "power-law":
        return rotated(1 / torch.arange(1, 121) ** 1.5)
    return dense_hessian(make(name))


NAMES = ["random", "outlier", "power-law", "unequal-batches"]


class Counting:
    """Operator that keeps copies of the vectors that it multiplied."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.vectors = a, list[Tensor]()
        self.size, self.dtype, self.device = len(a), a.dtype, a.device

    def matvec(self, v: Tensor) -> Tensor:
        self.vectors.append(v.clone())
        return self.a @ v


@cache
def runs(name: str) -> list[SpectralDensity]:
    a = matrix(name)
    return [spectral_density(Counting(a), probes=PROBES, steps=12, grid=64, generator=seeded(s)) for s in range(SEEDS)]


def gaussians(points: Tensor, eigenvalues: Tensor, width: float) -> Tensor:
    normal = torch.distributions.Normal(eigenvalues, width)
    return normal.log_prob(points[:, None]).exp()


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_two_standard_errors_cover_the_traces(name: str, power: int) -> None:
    exact = float((torch.linalg.eigvalsh(matrix(name)) ** power).sum())
    estimates = [run.trace_of(lambda x: x**power) for run in runs(name)]
    covered = sum(abs(value - exact) <= 2 * error for value, error in estimates)
    # A normal law says 95 %; where one outlier rules, χ² with 8 degrees of freedom says 92 %. 200 draws: ± 2 %.
    assert covered >= 0.85 * SEEDS


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_unbiased_and_their_error_is_not_too_large(name: str, power: int) -> None:
    values = torch.linalg.eigvalsh(matrix(name)) ** power
    n = len(values)
    # Moments of the uniform law on the sphere, applied to the true eigenvalues: E vᵢ⁴ = 3 E vᵢ²vⱼ² = 3 / n(n + 2).
    fourth, mixed = 3 / (n * (n + 2)), 1 / (n * (n + 2))
    variance = n**2 * ((fourth - mixed) * (values**2).sum() + (mixed - 1 / n**2) * values.sum() ** 2) / PROBES
    estimates = torch.tensor([run.trace_of(lambda x: x**power) for run in runs(name)], dtype=torch.float64)
    # Four standard errors of a mean of 200.
    assert abs(float(estimates[:, 0].mean() - values.sum())) <= 4 * math.sqrt(variance / SEEDS)
    # The root mean square of 200 values that scatter by up to 70 % each (the outlier): 15 % is three standard errors.
    assert float((estimates[:, 1] ** 2).mean().sqrt()) == pytest.approx(math.sqrt(variance), rel=0.15)
    assert float(estimates[:, 0].std()) == pytest.approx(math.sqrt(variance), rel=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_two_standard_errors_cover_the_density(name: str) -> None:
    eigenvalues = torch.linalg.eigvalsh(matrix(name))
    shares = []
    for run in runs(name):
        exact = gaussians(run.grid, eigenvalues, run.width).mean(dim=1)
        populated = exact > 1e-2 * exact.max()  # beyond it both are tails of Gaussians
        shares.append(((run.density - exact).abs() <= 2 * run.density_error)[populated].double().mean())
    assert float(torch.stack(shares).mean()) >= 0.85


def test_fields_are_the_traces() -> None:
    run = runs("random")[0]
    assert (run.trace, run.trace_error) == run.trace_of(lambda x: x)
    assert (run.trace_of_square, run.trace_of_square_error) == run.trace_of(lambda x: x**2)


@pytest.mark.parametrize("name", ["unequal-batches", "tied", "multi-head-attention", "gru"])
def test_hessian_of_a_net(name: str) -> None:
    problem = make(name)
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(problem))
    operator = HessianOperator(problem.module, problem.loss_fn, problem.batches)
    found = spectral_density(operator, probes=5, steps=len(eigenvalues))
    # One fixed seed each; four standard errors.
    assert abs(found.trace - float(eigenvalues.sum())) <= 4 * found.trace_error
    assert abs(found.trace_of_square - float((eigenvalues**2).sum())) <= 4 * found.trace_of_square_error
    # As many steps as dimensions: the ends have converged.
    assert found.largest == pytest.approx(float(eigenvalues[-1]), rel=1e-8)
    assert found.smallest == pytest.approx(float(eigenvalues[0]), rel=1e-8)


@pytest.mark.parametrize("steps", [3, 4, 40])
def test_few_distinct_eigenvalues_end_early_and_exactly(steps: int) -> None:
    levels = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    diagonal = levels.repeat_interleave(torch.tensor([50, 30, 20]))
    operator = Counting(torch.diag(diagonal))
    found = spectral_density(operator, probes=5, steps=steps)
    assert found.matvecs == len(operator.vectors) == 15
    # Rounding of a few u; the weights are exact to u over the distance of the levels.
    torch.testing.assert_close(found.nodes, levels.expand(5, 3), rtol=0, atol=1e-12)
    for power in range(9):
        for probe, v in enumerate(operator.vectors[::3]):
            exact = (diagonal**power * v**2).sum()
            torch.testing.assert_close(
                (found.nodes[probe] ** power * found.weights[probe]).sum(), exact, rtol=1e-11, atol=0
            )


@pytest.mark.parametrize("steps", [3, 5, 9])
def test_quadrature_is_exact_up_to_degree_2m_minus_1(steps: int) -> None:
    a = matrix("random") / 10
    operator = Counting(a)
    found = spectral_density(operator, probes=3, steps=steps)
    for probe, v in enumerate(operator.vectors[::steps]):
        w = v
        for power in range(2 * steps + 1):
            moment, scale = v @ w, (found.nodes[probe].abs() ** power * found.weights[probe]).sum()
            error = abs((found.nodes[probe] ** power * found.weights[probe]).sum() - moment) / scale
            assert (error < 1e-11) == (power < 2 * steps)
            w = a @ w


def test_cumulative_density() -> None:
    eigenvalues = torch.linalg.eigvalsh(random_symmetric(300))
    found = spectral_density(Counting(random_symmetric(300)), probes=16, steps=40, grid=512)
    points = torch.linspace(float(eigenvalues[0]), float(eigenvalues[-1]), 97, dtype=torch.float64)
    # Gauss rules bracket the distribution function of their measure to within the weight at a node.
    resolution = float(found.weights.max(dim=1).values.mean())
    for t in points.tolist():
        estimate, error = found.trace_of(lambda x, t=t: (x <= t).double())
        assert abs(estimate - float((eigenvalues <= t).sum())) <= 300 * resolution + 4 * error
    area = torch.cat([torch.zeros(1).double(), torch.cumulative_trapezoid(found.density, found.grid)])
    smooth = torch.distributions.Normal(eigenvalues, found.width).cdf(found.grid[:, None])
    error = (2 * smooth.var(dim=1, correction=0) / (302 * 16)).sqrt()
    # Four standard errors; a tail beyond four widths and the trapezoid rule are 1e-4 each.
    assert bool(((area - smooth.mean(dim=1)).abs() <= 4 * error + 5e-4).all())


@pytest.mark.parametrize("steps", [6, 10, 40])
@pytest.mark.parametrize("seed", range(5))
def test_default_width_leaves_the_quadrature_no_share_in_the_error(steps: int, seed: int) -> None:
    """Against the exact broadened spectral measure of the very probe, whose sampling error is thus the same."""
    eigenvalues = torch.linspace(-1, 1, 300, dtype=torch.float64)
    operator = Counting(torch.diag(eigenvalues))
    found = spectral_density(operator, probes=1, steps=steps, generator=seeded(seed))
    exact = (gaussians(found.grid, eigenvalues, found.width) * operator.vectors[0] ** 2).sum(dim=1)
    assert float((found.density - exact).abs().max()) < 0.1 * float(found.density_error.max())


@pytest.mark.parametrize("seed", range(5))
def test_outliers_leave_the_resolution_of_the_bulk(seed: int) -> None:
    """Each outlier costs about a step; the range of the bulk / steps is then as safe a width as the default."""
    eigenvalues = torch.cat([torch.tensor([40.0, 25.0, 10.0]), torch.linspace(-0.5, 1.0, 297)]).double()
    operator = Counting(torch.diag(eigenvalues))
    points = torch.linspace(-0.8, 1.3, 200)
    found = spectral_density(operator, probes=1, steps=40, grid=points, width=1.5 / 40, generator=seeded(seed))
    exact = (gaussians(found.grid, eigenvalues, found.width) * operator.vectors[0] ** 2).sum(dim=1)
    assert float((found.density - exact).abs().max()) < 0.1 * float(found.density_error.max())


def test_density_is_normalized_and_its_grid_spans_it() -> None:
    for name in NAMES:
        found = runs(name)[0]
        # Four widths beyond the ends lie 6e-5 of a Gaussian; the trapezoid rule on steps ≤ a width adds less.
        assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1.0, abs=2e-4)
        assert found.width == pytest.approx((found.largest - found.smallest) / 12, rel=1e-12)
        torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(PROBES).double(), rtol=0, atol=1e-13)


def test_given_points_and_width() -> None:
    points = torch.tensor([3.0, -1.0, 0.0])
    found = spectral_density(Counting(torch.diag(torch.tensor([0.0, 0.0, 3.0]).double())), grid=points, width=0.1)
    assert (found.grid.dtype, found.grid.tolist(), found.width) == (torch.float64, points.tolist(), 0.1)
    peak = 1 / (0.1 * math.sqrt(2 * math.pi))
    share = float(found.weights[:, 1].mean())
    assert found.density.tolist() == pytest.approx([share * peak, 0.0, (1 - share) * peak], abs=1e-12)


def test_ends_are_bounds_and_converge_on_outliers() -> None:
    eigenvalues = torch.linalg.eigvalsh(matrix("outlier"))
    for run in runs("outlier"):
        assert run.largest <= float(eigenvalues[-1]) + 1e-12
        assert run.smallest >= float(eigenvalues[0]) - 1e-12
        # (bulk radius / distance)^(2·11) is below rounding
        assert run.largest == pytest.approx(40.0, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fewer_dimensions_than_steps(n: int) -> None:
    a = random_symmetric(n)
    eigenvalues = torch.linalg.eigvalsh(a)
    found = spectral_density(Counting(a), probes=4, steps=40)
    assert found.matvecs == 4 * n
    torch.testing.assert_close(found.nodes, eigenvalues.expand(4, n), rtol=0, atol=1e-10)
    assert abs(found.trace - float(eigenvalues.sum())) <= 4 * found.trace_error + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_deficient(dtype: torch.dtype) -> None:
    eigenvalues = torch.cat([torch.tensor([5.0, 2.0, -1.0]), torch.zeros(57)])
    operator = Counting(rotated(eigenvalues).to(dtype))
    found = spectral_density(operator, probes=6, steps=20)
    u = torch.finfo(dtype).eps
    # Three values and zero. In float32 what is left after four steps can pass for a direction: a zero of weight u².
    assert 24 <= found.matvecs == len(operator.vectors) <= (24 if dtype == torch.float64 else 48)
    for level, share in {5.0: 1 / 60, 2.0: 1 / 60, -1.0: 1 / 60, 0.0: 57 / 60}.items():
        near = (found.nodes - level).abs() < 100 * u
        mean = float((near * found.weights).sum()) / 6
        # Four standard errors of a share on the sphere.
        assert abs(mean - share) <= 4 * math.sqrt(2 * share * (1 - share) / (62 * 6))
    assert abs(found.trace - 6.0) <= 4 * found.trace_error


@pytest.mark.parametrize(("factor", "width"), [(0.0, 1.0 / 40), (-3.0, 3.0 / 40)])
def test_multiples_of_the_identity_have_no_error(factor: float, width: float) -> None:
    found = spectral_density(lambda v: factor * v, size=50, dtype=torch.float64, probes=3)
    assert found.matvecs == 3
    assert (found.trace, found.trace_error) == pytest.approx((50 * factor, 0.0), abs=1e-11)
    assert (found.trace_of_square, found.trace_of_square_error) == pytest.approx((50 * factor**2, 0.0), abs=1e-11)
    assert found.width == pytest.approx(width, rel=1e-12)
    assert bool(torch.isfinite(found.density).all())


def test_probes_that_end_at_different_steps() -> None:
    """The products of the second probe are those of a matrix with two eigenvalues."""
    calls, many, two = [0], torch.linspace(0, 1, 30).double(), torch.tensor([1.0, 2.0]).double().repeat(15)

    def matvec(v: Tensor) -> Tensor:
        calls[0] += 1
        return (many if calls[0] <= 3 else two) * v

    found = spectral_density(matvec, size=30, dtype=torch.float64, probes=2, steps=3)
    assert found.matvecs == calls[0] == 5
    assert found.nodes[1].tolist() == pytest.approx([1.0, 2.0, 2.0], rel=1e-13)
    assert found.weights[1, 2] == 0.0
    assert float(found.weights[1].sum()) == pytest.approx(1.0, rel=1e-14)


def test_float32_agrees_with_float64() -> None:
    a = matrix("random")
    single = spectral_density(Counting(a.float()), probes=64, steps=12)
    exact = torch.linalg.eigvalsh(a)
    assert abs(single.trace - float(exact.sum())) <= 4 * single.trace_error
    assert abs(single.trace_of_square - float((exact**2).sum())) <= 4 * single.trace_of_square_error
    assert single.nodes.dtype == single.weights.dtype == single.density.dtype == torch.float64


def test_seed_decides_the_probes() -> None:
    def run(generator: torch.Generator | None) -> Tensor:
        return spectral_density(Counting(matrix("random")), probes=2, steps=5, generator=generator).weights

    assert torch.equal(run(None), run(seeded(0)))
    assert torch.equal(run(seeded(7)), run(seeded(7)))
    assert not torch.equal(run(seeded(7)), run(seeded(8)))
    assert not torch.equal(run(None)[0], run(None)[1])


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    spectral_density(Counting(torch.eye(30)))
    assert torch.equal(torch.get_rng_state(), before)


def test_vectors_of_a_probe_stay_orthonormal() -> None:
    """Also after the outlier has converged, where the three-term recurrence alone makes copies of it."""
    operator = Counting(matrix("outlier"))
    spectral_density(operator, probes=1, steps=60)
    v = torch.stack(operator.vectors)
    torch.testing.assert_close(v @ v.T, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [1, 7], ids=["first-probe", "second-probe"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_product_that_is_not_finite_raises(value: float, bad: int) -> None:
    calls = [0]

    def matvec(v: Tensor) -> Tensor:
        calls[0] += 1
        return torch.full_like(v, value) if calls[0] == bad else torch.arange(20.0) * v

    with pytest.raises(RuntimeError, match="Expected finite matrix-vector products, got NaN or infinity"):
        spectral_density(matvec, size=20, probes=2, steps=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": None}, "Expected `size` for a plain function, got None"),
        ({"size": 0}, "Expected `size` >= 1, got 0"),
        ({"probes": 0}, "Expected `probes` >= 1, got 0"),
        ({"steps": 2}, "Expected `steps` >= 3, got 2"),
        ({"grid": 1}, "Expected `grid` >= 2 points, got 1"),
        ({"grid": torch.ones(2, 2)}, r"Expected `grid` to be finite and of shape \(g,\), got tensor"),
        ({"grid": torch.ones(0)}, "Expected `grid` to be finite"),
        ({"grid": torch.tensor([0.0, math.nan])}, "Expected `grid` to be finite"),
        ({"width": 0.0}, "Expected finite `width` > 0, got 0.0"),
        ({"width": math.inf}, "Expected finite `width` > 0, got inf"),
        ({"width": math.nan}, "Expected finite `width` > 0, got nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_density(lambda v: v, **({"size": 5} | arguments))


def test_result_is_frozen() -> None:
    with pytest.raises(AttributeError):
        runs("random")[0].trace = 0.0  # type: ignore[misc]
