"""Perturbations by rounding: none for powers of two, the last bits for others."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam

from eos_monitor import critical_curvature
from eos_monitor.optim import PerturbedSGD, perturbed
from tests.optim.relaxed import Step, make_net, same, stream, weights

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "decay": {"weight_decay": 1e-2},
    "momentum": {"momentum": 0.9, "weight_decay": 1e-2},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "maximize": {"momentum": 0.9, "maximize": True, "lr": 1e-2},
}
each = pytest.mark.parametrize("name", SETTINGS)
STEPS = 60


def trained(cls: Any, dtype: torch.dtype, steps: int = STEPS, **settings: Any) -> list[torch.Tensor]:
    net = make_net(dtype=dtype)
    Step(net, cls(net.parameters(), **{"lr": 0.1, **settings}), stream(dtype=dtype))(steps)
    return weights(net)


@DTYPES
@each
def test_factor_one_is_sgd(name: str, dtype: torch.dtype) -> None:
    ours = trained(PerturbedSGD, dtype, k=1, **SETTINGS[name])
    for foreach in (False, True):
        assert same(ours, trained(SGD, dtype, foreach=foreach, **SETTINGS[name]))


@DTYPES
@pytest.mark.parametrize("k", [2, 4, 8])
@each
def test_powers_of_two_change_nothing(name: str, k: int, dtype: torch.dtype) -> None:
    assert same(trained(PerturbedSGD, dtype, k=k, **SETTINGS[name]), trained(SGD, dtype, **SETTINGS[name]))


@DTYPES
@pytest.mark.parametrize("k", [3, 5, 7])
@each
def test_odd_factors_change_the_last_bits(name: str, k: int, dtype: torch.dtype) -> None:
    changed, plain = (
        trained(cls, dtype, 20, **rest, **SETTINGS[name]) for cls, rest in ((PerturbedSGD, {"k": k}), (SGD, {}))
    )
    assert not same(changed, plain)
    # Few bits in a step, as most of what a product loses is lost again in adding it; in 20 steps nothing amplifies.
    assert all(
        torch.allclose(a, b, rtol=0, atol=100 * torch.finfo(dtype).eps) for a, b in zip(changed, plain, strict=True)
    )


@DTYPES
def test_three_times_a_power_of_two_is_three(dtype: torch.dtype) -> None:
    """Table 5 of the paper: k and 2ⁿ k go the same way."""
    assert same(trained(PerturbedSGD, dtype, k=3, momentum=0.9), trained(PerturbedSGD, dtype, k=12, momentum=0.9))


def test_it_is_the_momentum_vector_that_is_perturbed() -> None:
    """(η/k)·(k v), written out; the velocity itself is SGD's."""
    (p, q) = (nn.Parameter(torch.linspace(0.1, 1, 40)) for _ in range(2))
    ours = PerturbedSGD([p], 0.1, 0.9, k=3)
    torchs = SGD([q], 0.1, 0.9)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        p.grad = torch.randn(40, generator=g)
        q.grad = p.grad.clone()
        before = p.detach().clone()
        ours.step(), torchs.step()
        velocity = torchs.state[q]["momentum_buffer"]
        assert torch.equal(ours.state[p]["momentum_buffer"], velocity)
        assert torch.equal(p.detach(), before.add(velocity * 3, alpha=-0.1 / 3))
    assert not torch.equal(p, q)


OPTIMIZERS: dict[str, Any] = {
    "adam": lambda params: Adam(params, lr=0.01, weight_decay=1e-2),
    "adam-foreach": lambda params: Adam(params, lr=0.01, foreach=True),
    "adam-fused": lambda params: Adam(params, lr=0.01, fused=True),
    "sgd": lambda params: SGD(params, lr=0.1),
    "momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "lbfgs": lambda params: LBFGS(params, lr=0.1, max_iter=3),
}


def wrapped(
    name: str, dtype: torch.dtype, k: int | None, steps: int = STEPS, closure: bool = True
) -> list[torch.Tensor]:
    net = make_net(dtype=dtype)
    optimizer = OPTIMIZERS[name](net.parameters())
    if k is not None:
        assert perturbed(optimizer, k) is optimizer
    step = Step(net, optimizer, stream(dtype=dtype))
    for _ in range(steps):
        if closure:
            step()
        else:
            step.closure()
            optimizer.step()
    return weights(net)


@DTYPES
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_wrapped_by_a_power_of_two_nothing_changes(name: str, k: int, dtype: torch.dtype) -> None:
    assert same(wrapped(name, dtype, k), wrapped(name, dtype, None))


@DTYPES
@pytest.mark.parametrize("closure", [True, False], ids=["closure", "gradients"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_wrapped_by_an_odd_number_the_last_bits_change(name: str, closure: bool, dtype: torch.dtype) -> None:
    changed, plain = (wrapped(name, dtype, k, steps=8, closure=closure) for k in (3, None))
    assert not same(changed, plain)
    # Gradients are off by a few roundings; Adam passes on relative errors, times its learning rate.
    assert all(
        torch.allclose(a, b, rtol=0, atol=100 * torch.finfo(dtype).eps) for a, b in zip(changed, plain, strict=True)
    )


def test_every_call_of_a_closure_is_perturbed() -> None:
    """LBFGS calls it several times in a step."""

    class Gradients(SGD):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            self.seen = [closure() and [p.grad.clone() for p in self.param_groups[0]["params"]] for _ in range(3)]

    def batches() -> Iterator[Any]:
        while True:
            yield next(stream())

    nets = [make_net(), make_net()]
    optimizers = [perturbed(Gradients(nets[0].parameters(), lr=0.1), 3), Gradients(nets[1].parameters(), lr=0.1)]
    for net, optimizer in zip(nets, optimizers, strict=True):
        Step(net, optimizer, batches())()
    for ours, plain in zip(*(optimizer.seen for optimizer in optimizers), strict=True):
        assert same(ours, [g.mul(3).mul(1 / 3) for g in plain])
        assert not same(ours, plain)


def test_closure_by_name() -> None:
    net = make_net()
    step = Step(net, perturbed(SGD(net.parameters(), lr=0.1), 3), stream())
    loss = step.optimizer.step(closure=step.closure)
    assert loss > 0
    assert step.calls == 1
    assert same(weights(net), wrapped("sgd", torch.float64, 3, steps=1))


@each
def test_edge_is_sgds(name: str) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    ours, torchs = (critical_curvature(cls([p], **{"lr": 0.1, **SETTINGS[name]})) for cls in (PerturbedSGD, SGD))
    assert ours.threshold == pytest.approx(torchs.threshold, rel=1e-15)
    assert torch.allclose(ours.c, torchs.c, rtol=1e-15)
    assert torch.equal(ours.l2, torchs.l2)
    assert ours.sign == torchs.sign
    assert critical_curvature(perturbed(SGD([p], lr=0.1), 3)).threshold == 2
