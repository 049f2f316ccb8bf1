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


def test_settings_hold_for_the_proposed_step_only() -> None:
    params, optimizer = trained(lambda ps: torch.optim.SGD([{"params": ps[:1]}, {"params": ps[1:]}], lr=0.1))
    gradient = torch.linspace(-1, 1, 10)
    update = proposed_update([optimizer], gradient, settings={"lr": 0.5})
    assert torch.allclose(update, -0.5 * gradient, atol=1e-7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert torch.allclose(proposed_update([optimizer], gradient), -0.1 * gradient, atol=1e-7)


def test_each_of_several_optimizers_takes_its_step() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    several = [torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=1.0)]
    assert trained_parameters(several) == [a, b]
    update = proposed_update(several, torch.arange(5.0))
    assert torch.allclose(update, torch.tensor([0.0, -0.1, -2.0, -3.0, -4.0]), atol=1e-7)


def test_a_step_that_asks_for_its_loss_gets_it_where_it_stands() -> None:
    """LBFGS on ½ Σ hᵢxᵢ²: its first step is along −g, of length at most 1, and after it the loss is asked for again."""
    h = torch.tensor([1.0, 4.0])
    p = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.LBFGS([p], lr=0.1, max_iter=2)
    places = []

    def loss_at(shift: Tensor) -> tuple[float, Tensor]:
        x = torch.tensor([1.0, 1.0]) + shift
        places.append(shift.clone())
        return float(0.5 * (h * x * x).sum()), h * x

    update = proposed_update([optimizer], h.clone(), loss_at=loss_at)
    assert torch.equal(places[0], torch.zeros(2))
    assert torch.allclose(places[1], -0.1 / 5.0 * h, atol=1e-6)  # lr · min(1, 1 / ‖g‖₁) · g
    assert float((h * (1.0 + update) ** 2).sum()) < float(h.sum())
    assert torch.equal(p.detach(), torch.tensor([1.0, 1.0]))


def test_a_step_that_only_may_ask_does_not() -> None:
    def never(shift: Tensor) -> tuple[float, Tensor]:
        raise AssertionError("asked")

    p = nn.Parameter(torch.ones(2))
    update = proposed_update([torch.optim.SGD([p], lr=0.5)], torch.ones(2), loss_at=never)
    assert torch.allclose(update, torch.tensor([-0.5, -0.5]))


@pytest.mark.parametrize("mode", [True, False, None])
def test_an_optimizer_in_eval_mode_proposes_nothing(mode: bool | None) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.5)
    if mode is not None:
        optimizer.param_groups[0]["train_mode"] = mode
    if mode is False:
        with pytest.raises(ValueError, match="Expected optimizers in train mode, got SGD in eval mode"):
            proposed_update([optimizer], torch.ones(2))
    else:
        assert torch.allclose(proposed_update([optimizer], torch.ones(2)), torch.tensor([-0.5, -0.5]))


def test_gradients_come_in_the_parameters_own_type_and_no_generator_moves() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    assert p.grad.dtype == p.dtype
                    assert torch.is_grad_enabled()
                    p.data.add_(torch.rand(p.shape) + p.grad)

    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    before = torch.get_rng_state()
    with torch.no_grad():
        one, two = (proposed_update([Noisy([p], lr=1.0)], torch.tensor([1.0, 2.0])) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.dtype == torch.float64


def test_a_twin_has_settings_and_state_of_its_own() -> None:
    params, optimizer = trained(BUILDERS["adamw"])
    stand_ins = {p: p.detach().clone().requires_grad_() for p in params}
    twin = twin_optimizer(optimizer, stand_ins)
    assert type(twin) is type(optimizer)
    assert [p for group in twin.param_groups for p in group["params"]] == list(stand_ins.values())
    assert all(equal(twin.state[stand_in], optimizer.state[p]) for p, stand_in in stand_ins.items())
    twin.param_groups[0]["lr"] = 9.0
    twin.state[stand_ins[params[0]]]["exp_avg"].zero_()
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert bool(optimizer.state[params[0]]["exp_avg"].any())


def test_one_group_in_eval_mode_is_enough() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=0.5)
    optimizer.param_groups[0]["train_mode"] = True
    optimizer.param_groups[1]["train_mode"] = False
    with pytest.raises(ValueError, match="Expected optimizers in train mode"):
        proposed_update([optimizer], torch.ones(4))
