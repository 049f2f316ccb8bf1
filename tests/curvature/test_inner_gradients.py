"""Losses that differentiate inside: by their inputs, which may require a gradient themselves, or by what they make."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from eos_monitor import HessianOperator, Probe, StabilityProbe, measure_stability


def net_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def points(n: int = 32) -> Tensor:
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(1))


def slope(net: Any, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return gradient


def collocation(net: Any, batch: Any) -> Tensor:
    """u_t + u·u_x = 0, at points that require a gradient in the batch."""
    u = net(batch["x"])
    u_t, u_x = slope(net, batch["x"]).unbind(1)
    return (u_t + u.squeeze(1) * u_x).square().mean() + u.square().mean()


def penalty(net: Any, batch: Any) -> Tensor:
    """A gradient penalty, at points that the loss makes."""
    x = batch["x"].detach().clone().requires_grad_()
    return (slope(net, x).norm(dim=1) - 1).square().mean() + (net(batch["x"]) - 1).square().mean()


def fgsm(net: Any, batch: Any) -> Tensor:
    x = batch["x"].detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad((net(x) - 1).square().mean(), x)
    return (net(batch["x"].detach() + 0.05 * gradient.sign()) - 1).square().mean()


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {"collocation": collocation, "penalty": penalty, "fgsm": fgsm}


def batch_of(name: str, n: int = 32) -> dict[str, Tensor]:
    return {"x": points(n).requires_grad_(name == "collocation")}


def dense_hessian(net: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any) -> Tensor:
    """By rows of the gradient's own graph, in double precision, without the package."""
    net.double()
    batch = {"x": batch["x"].detach().double().requires_grad_(batch["x"].requires_grad)}
    params = list(net.parameters())
    first = torch.autograd.grad(loss_fn(net, batch), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in first])
    rows = [torch.autograd.grad(one, params, retain_graph=True, allow_unused=True) for one in flat]
    filled = [[torch.zeros_like(p) if g is None else g for g, p in zip(row, params, strict=True)] for row in rows]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in filled])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batches", [1, 3])
def test_edge_ratio_of_a_loss_that_differentiates_inside(name: str, batches: int) -> None:
    net = net_of()
    given = [batch_of(name) for _ in range(batches)]
    reading = measure_stability(net, LOSSES[name], given, SGD(net.parameters(), lr=0.1))
    exact = torch.linalg.eigvalsh(dense_hessian(net, LOSSES[name], given[0]))[-1]
    assert reading.sharpness == pytest.approx(float(exact), rel=1e-3)
    assert reading.converged
    assert [b["x"].requires_grad for b in given] == [name == "collocation"] * batches
    assert all(b["x"].grad is None for b in given)


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW])
@pytest.mark.parametrize("name", LOSSES)
def test_every_reading_of_a_run_is_taken_from_the_first_step_on(name: str, optimizer: Any) -> None:
    """An adaptive state that is too young leaves the loss only, which was evaluated without recording."""
    net = net_of()
    steps = optimizer(net.parameters(), lr=1e-3)
    probe = StabilityProbe(net, steps, LOSSES[name], every_n_steps=4, probe=Probe(samples=32))
    for _ in range(49):
        probe.step(batch_of(name))
        steps.zero_grad()
        LOSSES[name](net, batch_of(name)).backward()
        steps.step()
    assert not probe.off
    assert len(probe.readings) == 13
    assert probe.readings[-1].edge_ratio is not None


@pytest.mark.parametrize("name", LOSSES)
def test_loss_without_products_is_that_of_a_plain_call(name: str) -> None:
    net = net_of()
    found = HessianOperator(net, LOSSES[name], [batch_of(name)]).evaluate()
    assert found == pytest.approx(float(LOSSES[name](net, batch_of(name)).detach()), rel=1e-6)


def test_a_batch_that_hangs_on_a_graph_is_a_leaf_in_an_evaluation() -> None:
    """What made it is no part of the loss."""
    net = net_of()
    scale = torch.ones((), requires_grad=True)
    x = {"x": points() * scale}
    reading = measure_stability(net, collocation, [x], SGD(net.parameters(), lr=0.1))
    assert reading.converged
    assert scale.grad is None
    (x["x"].sum()).backward()  # the user's own graph is still there
    assert scale.grad is not None
