"""What one reading takes over from those before it, what it costs, and what it says of both."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, Rprop

from eos_monitor import Solver, StabilityReading, measure_stability
from eos_monitor.curvature.hessian import HessianOperator
from eos_monitor.readings.gauge import Gauge
from tests.curvature.test_hessian import OnceTanh

ONE = [torch.zeros(1)]


class Diagonal(nn.Module):
    """½ Σ hᵢθᵢ² at θ = 1, of several parameters."""

    def __init__(self, *parts: list[float]) -> None:
        super().__init__()
        self.h = [torch.tensor(part, dtype=torch.float64) for part in parts]
        self.theta = nn.ParameterList([nn.Parameter(torch.ones(len(part), dtype=torch.float64)) for part in parts])
        self.calls = [0]

    def forward(self, batch: Any) -> Tensor:
        return 0.5 * sum((h * p * p).sum() for h, p in zip(self.h, self.theta, strict=True))


def loss_of(net: Diagonal, batch: Any) -> Tensor:
    return net(batch)


class Run:
    """Readings of a net with one gauge, and how often its loss is evaluated."""

    def __init__(self, net: nn.Module, optimizers: list[Optimizer], **solver: Any) -> None:
        self.net = net
        self.optimizers = optimizers
        self.gauge = Gauge(Solver(**({"rtol": 1e-6} | solver)))
        self.evaluations = 0

    def read(self, **settings: Any) -> StabilityReading:
        self.evaluations = 0

        def counted(module: Any, batch: Any) -> Tensor:
            self.evaluations += 1
            return loss_of(module, batch)

        given = {"step": 0, "full_batch": True} | settings
        return self.gauge.measure(self.net, counted, ONE, self.optimizers, **given).reading


def sgd(net: nn.Module, lr: float = 0.5, **settings: Any) -> SGD:
    return SGD(net.parameters(), lr=lr, **settings)


def test_all_numbers_of_gradient_descent_in_closed_form() -> None:
    """r = lr λ / 2; with a decay of 0.5 the free sharpness is r c − 0.5, and the scale solves s·lr (λ + 0.5) = 2."""
    net = Diagonal([3.0, 1.0, -9.0])
    found = Run(net, [sgd(net, weight_decay=0.5)], k=2).read(step=7)
    assert (found.step, found.method, found.samples, found.ready) == (7, "double-backward", 1, True)
    assert found.loss == pytest.approx(0.5 * (3.0 + 1.0 - 9.0))
    assert found.lr == (0.5,)
    assert found.edge_ratio == pytest.approx(0.875)
    assert found.eigenvalues == pytest.approx((0.875, 0.375))
    assert found.threshold == pytest.approx(2.0)
    assert found.normalized_sharpness == pytest.approx(1.75)
    assert found.sharpness == pytest.approx(3.0)
    assert found.edge_scale == pytest.approx(1 / 0.875)
    assert found.edge_lr == pytest.approx((0.5 / 0.875,))
    assert found.residual == pytest.approx(0.0, abs=1e-6)
    assert found.error == pytest.approx(0.0, abs=1e-6)
    assert found.sampling_error == 0.0
    assert found.notes == ()
    assert found.converged
    assert found.seconds is not None
    assert found.seconds > 0.0


def test_modes_are_kept_for_whoever_wants_them() -> None:
    net = Diagonal([3.0, 1.0, -9.0])
    run = Run(net, [sgd(net)], k=2)
    assert run.gauge.modes is None
    run.read()
    assert run.gauge.modes is not None
    expected = torch.eye(3, dtype=torch.float64)[:, :2] * math.sqrt(0.5 / 2)  # C^-½ = (lr / 2)^½
    assert torch.allclose(run.gauge.modes.abs(), expected, atol=1e-5)


def test_products_are_checked_once() -> None:
    """The first reading takes four gradients more, in double precision; the later ones only their products' graph."""
    net = Diagonal([3.0, 1.0, -9.0, 0.5])
    run = Run(net, [sgd(net)])
    counts = []
    for _ in range(3):
        run.read()
        counts.append(run.evaluations)
    assert counts[1] == counts[2] == counts[0] - 4


def test_and_again_where_other_parameters_are_trained() -> None:
    net = Diagonal([3.0, 1.0], [2.0])
    only = SGD([net.theta[0]], lr=0.5)
    run = Run(net, [only])
    run.read()
    run.read()
    rest = run.evaluations
    only.add_param_group({"params": [net.theta[1]], "lr": 0.5})
    run.read()
    assert run.evaluations >= rest + 4
    run.read()
    assert run.evaluations == rest


@pytest.mark.parametrize("raw", [False, True])
def test_finite_differences_choose_their_step_once(raw: bool) -> None:
    """Six gradients for a step, four and two more for the check, two for each product."""
    net = Diagonal([3.0, 1.0, -9.0, 0.5])
    run = Run(net, [sgd(net)], method="fd", raw_sharpness=raw)
    first = run.read()
    extra = run.evaluations - 2 * first.matvecs
    assert first.method == "fd"
    assert first.edge_ratio == pytest.approx(0.75, rel=1e-5)
    later = run.read()
    assert run.evaluations - 2 * later.matvecs <= extra - 6 - 4


class Wrong(nn.Module):
    """Its second derivatives are silently wrong."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(1, 4)

    def forward(self, batch: Any) -> Tensor:
        return OnceTanh.apply(self.body(batch[:, None])).square().mean()


def test_products_are_checked_too_where_they_are_needed_along_the_update_only() -> None:
    net = Wrong()
    gauge = Gauge(Solver())
    found = gauge.measure(net, lambda m, b: m(b), [torch.ones(3)], [Rprop(net.parameters())], step=0, full_batch=True)
    assert gauge.products_are_wrong
    assert any("differ from finite differences" in note for note in found.reading.notes)
    # and nobody looks where no product is needed
    gauge = Gauge(Solver())
    still = [SGD(net.parameters(), lr=0.0)]
    gauge.measure(net, lambda m, b: m(b), [torch.ones(3)], still, step=0, full_batch=True)
    assert not gauge.products_are_wrong


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_products_of_the_scale_are_counted(decay: float) -> None:
    """Decoupled decay of one group bends C, so that the edge is solved for again; a product is two evaluations here."""
    net = Diagonal([3.0, 1.0], [2.0, 0.3])
    groups = [{"params": [net.theta[0]], "weight_decay": decay}, {"params": [net.theta[1]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.5, betas=(0.5, 0.9))
    with torch.no_grad():
        for _ in range(40):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    seen = [0]

    def counted(module: Any, batch: Any) -> Tensor:
        seen[0] += 1
        return module(batch)

    gauge = Gauge(Solver(rtol=1e-6))
    for _ in range(2):  # the first one checks the products
        seen[0] = 0
        found = gauge.measure(net, counted, ONE * 2, [optimizer], step=0, full_batch=True).reading
    assert found.edge_scale is not None
    assert (seen[0] - 2 * found.matvecs) in range(5)
    assert (found.matvecs > 4) is (decay > 0.0)


def test_a_start_vector_for_one_parameter() -> None:
    net = Diagonal([3.0])
    found = measure_stability(net, loss_of, ONE, sgd(net), v0=torch.ones(1, dtype=torch.float64), full_batch=True)
    assert found.edge_ratio == pytest.approx(0.75)
    with pytest.raises(ValueError, match=r"Expected `v0` of shape \(1,\)"):
        measure_stability(net, loss_of, ONE, sgd(net), v0=torch.ones(1, 0), full_batch=True)


def test_wrong_products_end_the_edge_for_all_readings_and_are_told_each_time() -> None:
    net = Wrong()
    gauge = Gauge(Solver(raw_sharpness=True))
    for _ in range(2):
        found = gauge.measure(
            net, lambda m, b: m(b), [torch.ones(3)], [SGD(net.parameters(), lr=0.1)], step=0, full_batch=True
        ).reading
        assert gauge.products_are_wrong
        assert (found.edge_ratio, found.sharpness) == (None, None)
        assert any("differ from finite differences" in note for note in found.notes)
        assert found.loss is not None
    assert gauge.modes is None


def test_a_check_without_a_finding_has_no_note() -> None:
    net = Diagonal([3.0, 1.0])
    run = Run(net, [sgd(net)])
    assert run.gauge.check_note is None
    assert not run.gauge.products_are_wrong
    run.read()
    assert run.gauge.check_note is None
    assert not run.gauge.products_are_wrong


# Sharpness beside the edge.


def test_raw_sharpness_costs_a_solve_where_it_does_not_follow() -> None:
    """Two groups of two rates: λ_max(H) is 4, the edge 0.5 · 3 / 2 = 0.75 of the other group."""
    net = Diagonal([3.0, 1.0], [4.0])
    groups = [{"params": [net.theta[0]], "lr": 0.5}, {"params": [net.theta[1]], "lr": 0.1}]
    plain = Run(net, [SGD(groups)]).read()
    assert (plain.edge_ratio, plain.sharpness) == (pytest.approx(0.75), None)
    raw = Run(net, [SGD(groups)], raw_sharpness=True).read()
    assert (raw.edge_ratio, raw.sharpness) == (pytest.approx(0.75), pytest.approx(4.0))
    assert raw.matvecs == plain.matvecs + 3
    assert raw.converged


def test_raw_sharpness_is_free_where_it_follows() -> None:
    net = Diagonal([3.0, 1.0])
    plain, raw = (Run(net, [sgd(net)], raw_sharpness=wanted).read() for wanted in (False, True))
    assert plain.sharpness == raw.sharpness == pytest.approx(3.0)
    assert plain.matvecs == raw.matvecs


def test_without_an_edge_raw_sharpness_stands_alone() -> None:
    net = Diagonal([3.0, 1.0])
    for optimizer in (Rprop(net.parameters()), Adam(net.parameters()), sgd(net, lr=0.0)):
        found = Run(net, [optimizer], raw_sharpness=True).read()
        assert (found.edge_ratio, found.sharpness) == (None, pytest.approx(3.0))
        assert found.converged
        assert found.matvecs > 0
        without = Run(net, [optimizer]).read()
        assert (without.edge_ratio, without.sharpness, without.matvecs) == (None, None, 0)


@pytest.mark.parametrize(("most", "converged"), [(2, False), (64, True)])
def test_both_solves_have_to_converge(most: int, converged: bool) -> None:
    g = torch.Generator().manual_seed(0)
    net = Diagonal([4.0, *torch.rand(60, generator=g).tolist()], [3.0])
    groups = [{"params": [net.theta[0]], "lr": 0.5}, {"params": [net.theta[1]], "lr": 0.1}]
    found = Run(net, [SGD(groups)], raw_sharpness=True, max_matvecs=most).read()
    assert found.converged is converged


# Notes.


def test_a_rate_of_zero_and_a_missing_threshold_are_told() -> None:
    net = Diagonal([3.0, 1.0], [4.0])
    assert Run(net, [sgd(net, lr=0.0)]).read().notes == ("no edge at a learning rate of 0",)
    assert Run(net, [Rprop(net.parameters())]).read().notes == ("no known threshold for Rprop (sign rule)",)
    both: list[Optimizer] = [SGD([net.theta[0]], lr=0.5), Rprop([net.theta[1]])]
    found = Run(net, both).read()
    assert found.edge_ratio == pytest.approx(0.75)
    assert found.notes == ("no known threshold for Rprop (sign rule); the edge ratio speaks of the other groups",)


@pytest.mark.parametrize(
    ("unused", "note"), [(0, ()), (1, ("25% of the trained parameters are not used by the loss",))]
)
def test_parameters_without_a_part_in_the_loss_are_told(unused: int, note: tuple[str, ...]) -> None:
    net = Diagonal([3.0, 1.0, 2.0], *([[0.0]] * unused))
    del net.h[1:]
    del_from = net.theta[1:]
    params = [net.theta[0], *del_from]

    def loss(module: Any, batch: Any) -> Tensor:
        return 0.5 * (module.h[0] * module.theta[0] ** 2).sum()

    gauge = Gauge(Solver())
    found = gauge.measure(net, loss, ONE, [SGD(params, lr=0.5)], step=0, full_batch=True).reading
    assert found.notes == note


def test_decay_that_is_unstable_by_itself_has_no_edge() -> None:
    net = Diagonal([3.0, 1.0])
    found = Run(net, [torch.optim.AdamW(net.parameters(), lr=1.0, weight_decay=3.0)]).read()
    assert found.edge_ratio is None


def test_a_reading_of_nothing_is_zero_and_has_no_residual() -> None:
    net = Diagonal([0.0, 0.0, 0.0])
    found = Run(net, [sgd(net)]).read()
    assert (found.edge_ratio, found.residual, found.converged) == (0.0, 0.0, True)


# Where a solve starts.


def test_a_reading_starts_from_the_modes_of_the_last() -> None:
    g = torch.Generator().manual_seed(0)
    net = Diagonal([4.0, *torch.rand(60, generator=g).tolist()])
    run = Run(net, [sgd(net, lr=0.1)])
    cold, warm = (run.read().matvecs for _ in range(2))
    assert warm < cold
    given = Run(net, [sgd(net, lr=0.1)])
    given.gauge.start_from(torch.eye(61, 1, dtype=torch.float64))
    assert given.read().matvecs < cold


def test_the_generator_of_a_loader_is_put_back() -> None:
    net = Diagonal([3.0])
    loader = torch.utils.data.DataLoader(torch.zeros(4), shuffle=True)
    before = torch.get_rng_state()
    Gauge(Solver()).measure(net, loss_of, loader, [sgd(net)], step=0, full_batch=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_operator_knows_how_many_samples_it_has() -> None:
    net = Diagonal([3.0])
    batches = [torch.zeros(3), torch.zeros(5)]
    assert HessianOperator(net, loss_of, batches).samples == 8
    found = Gauge(Solver()).measure(net, loss_of, batches, [sgd(net)], step=0, full_batch=True)
    assert found.reading.samples == 8
    counted = Gauge(Solver(), lambda batch: 2 * len(batch))
    assert counted.measure(net, loss_of, batches, [sgd(net)], step=0, full_batch=True).reading.samples == 16
