"""Twins step as the originals would, and leave them alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eos_monitor.isolation.twin import proposed_update, trained_parameters, twin_optimizer

BUILDERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "adam-fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, centered=True, momentum=0.5),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.01),
}


def trained(build: Callable[[Any], torch.optim.Optimizer]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 2), (4,))]
    optimizer = build(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return params, optimizer


def state_of(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_proposed_update_is_the_step_and_leaves_everything(build: Callable[[Any], torch.optim.Optimizer]) -> None:
    params, optimizer = trained(build)
    gradient = torch.linspace(-1, 1, 10)
    before, grads = [p.detach().clone() for p in params], [p.grad for p in params]
    state = state_of(optimizer)
    generator = torch.get_rng_state()
    update = proposed_update([optimizer], gradient)
    assert equal(state, state_of(optimizer))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    for p, part in zip(params, gradient.split([6, 4]), strict=True):
        p.grad = part.view(p.shape).clone()
    optimizer.step()
    taken = torch.cat([(p.detach() - q).reshape(-1) for p, q in zip(params, before, strict=True)])
    assert torch.equal(update, taken)


def test_twin_of_lbfgs_steps_on_its_own_parameters() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.LBFGS([p], lr=0.5)
    stand_in = p.detach().clone().requires_grad_()
    twin = twin_optimizer(optimizer, {p: stand_in})

    def closure() -> Tensor:
        twin.zero_grad()
        loss = stand_in.square().sum()
        loss.backward()
        return loss

    twin.step(closure)
    assert float(stand_in.detach().abs().max()) < 1e-3
    assert torch.equal(p.detach(), torch.tensor([1.0, 2.0]))


def test_twin_has_neither_hooks_nor_a_schedulers_wrapper() -> None:
    params, optimizer = trained(BUILDERS["sgd"])
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls.clear()
    stand_ins = {p: p.detach().clone().requires_grad_() for p in params}
    for stand_in in stand_ins.values():
        stand_in.grad = torch.ones_like(stand_in)
    twin_optimizer(optimizer, stand_ins).step()
    assert not calls
    optimizer.step()
    assert calls


def test_frozen_parameters_are_left_out() -> None:
    frozen, free = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(3))
    assert trained_parameters([torch.optim.SGD([frozen, free], lr=0.1)]) == [free]
