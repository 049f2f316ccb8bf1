"""Gradients that are the gradient of nothing: no edge is reported, and the reason is the right one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from eos_monitor import HessianOperator, batch_sharpness, measure_stability
from tests.curvature.test_hessian import OnceTanh

DISCOUNT = 0.9


def features(n: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    now, then = torch.randn(2, n, 4, generator=generator)
    return now, then, torch.randn(n, generator=generator)


def temporal_difference(net: Any, batch: Any) -> Tensor:
    """Targets from the net itself: the update field of linear TD(0) is Aθ − b with A = E[φ(φ − γφ')ᵀ]."""
    now, then, reward = batch
    target = reward + DISCOUNT * net(then).squeeze(1).detach()
    return 0.5 * (net(now).squeeze(1) - target).square().mean()


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False)


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def siamese(net: Any, batch: Any) -> Tensor:
    one, other = net(batch[0]), net(batch[1])
    return -F.cosine_similarity(net[2](one.tanh() @ net[2].weight), other.detach(), dim=1).mean()


def reversed_domain(net: Any, batch: Any) -> Tensor:
    hidden = net[1](net[0](batch[0]))
    return F.mse_loss(net[2](Reversal.apply(hidden)).sum(1), batch[2])


def straight_through(net: Any, batch: Any) -> Tensor:
    hidden = net[1](net[0](batch[0]))
    rounded = hidden + ((hidden * 8).tanh() - hidden).detach()
    return F.mse_loss(net[2](rounded).sum(1), batch[2])


def actor_critic(net: Any, batch: Any) -> Tensor:
    values = net(batch[0])[:, 0]
    log_policy = F.log_softmax(net(batch[0])[:, 1:], 1)[:, 0]
    advantage = (batch[2] - values).detach()
    return (values - batch[2]).square().mean() - (advantage * log_policy).mean()


FIELDS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any], Tensor]]] = {
    "td-linear": (linear, temporal_difference),
    "siamese": (deep, siamese),
    "reversal": (deep, reversed_domain),
    "straight-through": (deep, straight_through),
    "actor-critic": (deep, actor_critic),
}


def jacobian_asymmetry(net: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any) -> float:
    """Of the whole Jacobian, by central differences of plain backward passes in double precision."""
    net = copy.deepcopy(net).double()
    batch = tuple(x.double() for x in batch)
    params = list(net.parameters())
    start = nn.utils.parameters_to_vector(params).detach()

    def gradient(at: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(at, params)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_fn(net, batch), params)])

    steps = 1e-6 * torch.eye(len(start), dtype=torch.float64)
    rows = torch.stack([(gradient(start + h) - gradient(start - h)) / 2e-6 for h in steps])
    return float((rows - rows.T).norm() / rows.norm())


@pytest.mark.parametrize("method", ["auto", "fd"])
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_without_a_potential_gives_no_edge_and_is_called_that(name: str, method: Any) -> None:
    make, loss_fn = FIELDS[name]
    net = make()
    assert jacobian_asymmetry(net, loss_fn, features()) > 0.05
    reading = measure_stability(net, loss_fn, [features()], SGD(net.parameters(), lr=0.1), method=method)
    (note,) = [note for note in reading.notes if "potential" in note]
    assert reading.edge_ratio is None
    assert "weight_norm" not in note
    assert "method='fd' does without" not in note
    assert "batch_sharpness(method='fd')" in note


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(OnceTanh.apply(self.first(x)))


def regression(net: Any, batch: Any) -> Tensor:
    return F.mse_loss(net(batch[0]).squeeze(1), batch[2])


def test_a_gradient_that_cannot_be_differentiated_twice_has_a_potential() -> None:
    net = Once()
    assert jacobian_asymmetry(net, regression, features()) < 1e-6
    operator = HessianOperator(net, regression, [features()])
    check = operator.check(torch.ones(operator.size))
    assert (check.passed, check.asymmetry) == (False, 0.0)
    reading = measure_stability(net, regression, [features()], SGD(net.parameters(), lr=0.1))
    assert any("cannot be differentiated twice" in note for note in reading.notes)


@pytest.mark.parametrize("seed", range(5))
def test_finite_differences_of_a_potential_pass(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    operator = HessianOperator(net, regression, [features()], method="fd")
    check = operator.check(torch.randn(operator.size, generator=torch.Generator().manual_seed(seed)))
    assert check.passed
    assert check.asymmetry == 0.0


def test_what_the_note_names_holds_along_the_field() -> None:
    """Mean of gᵀAg / gᵀg by hand, A of linear TD(0), over two minibatches."""
    net = linear()
    batches = [features(seed=seed) for seed in (0, 1)]
    found = batch_sharpness(net, temporal_difference, batches, method="fd", rtol=0.0)
    theta = net.weight.detach().double().squeeze(0)
    ratios = []
    for now, then, reward in batches:
        now, then = now.double(), then.double()
        a = now.T @ (now - DISCOUNT * then) / len(now)
        g = a @ theta - now.T @ reward.double() / len(now)
        ratios.append(float(g @ a @ g / (g @ g)))
    assert found.value == pytest.approx(sum(ratios) / 2, rel=1e-3)
