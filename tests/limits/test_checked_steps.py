"""What the checker of critical curvatures lets pass, and what it takes apart: optimizers made for it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from eos_monitor.limits.threshold_check import ThresholdCheck, check_critical_curvature
from eos_monitor.limits.thresholds import register_critical_curvature


def verdict(
    predicted: float = 1.0, measured: float = 1.0, eigenvalue: complex = -1.0, rtol: float = 1e-6
) -> ThresholdCheck:
    return ThresholdCheck("X", (1.0, predicted), (1.0, measured), (-1.0, eigenvalue), (), (), rtol)


@pytest.mark.parametrize(
    ("given", "agrees"),
    [
        ({}, True),
        ({"predicted": 1.0 + 0.9e-6}, True),
        ({"predicted": 1.0 + 1.1e-6}, False),
        ({"predicted": 1.0 - 1.1e-6}, False),
        ({"predicted": 1.09, "rtol": 0.1}, True),
        ({"predicted": 1.11, "rtol": 0.1}, False),
        ({"eigenvalue": -1.0 + 0.9e-4}, True),
        ({"eigenvalue": -1.0 + 1.1e-4}, False),
        ({"eigenvalue": complex(-1.0, 1.1e-4)}, False),
        ({"eigenvalue": 1.0}, False),
        ({"predicted": math.inf, "measured": math.inf, "eigenvalue": complex(math.nan)}, True),
        ({"predicted": 5.0, "measured": math.inf, "eigenvalue": complex(math.nan)}, False),
        ({"predicted": math.inf, "measured": 5.0}, False),
    ],
)
def test_a_formula_agrees_to_its_tolerance_where_every_edge_is_a_flip(given: dict[str, Any], agrees: bool) -> None:
    check = verdict(**given)
    assert check.agrees is agrees
    assert ("right" if agrees else "wrong") in str(check)


def test_the_worst_of_all_edges_counts() -> None:
    check = ThresholdCheck("X", (1.1, 4.0, 0.9), (1.0, 2.0, 1.0), (-1.0,) * 3, (), (), 0.5)
    assert check.relative_error == pytest.approx(1.0)
    assert "predicted 4, measured 2 (off by 1)" in str(check)
    none = ThresholdCheck("X", (5.0,), (math.inf,), (complex(math.nan),), (), (), 0.5)
    assert none.relative_error == math.inf
    assert "eigenvalue" not in str(none)


@pytest.mark.parametrize("lr", [1e-11, 1e-6, 1e6, 1e11])
def test_edges_are_found_over_twenty_four_decades(lr: float) -> None:
    """2 / lr from 2e-11 to 2e11, with λ_max = 1 of the quadratic."""
    check = check_critical_curvature(lambda ps: SGD(ps, lr=lr), seeds=(0,), steps=1)
    assert check.measured == pytest.approx((2 / lr, 2 / lr), rel=1e-7)
    assert check.predicted == pytest.approx((2 / lr, 2 / lr), rel=1e-7)
    assert check.agrees


def test_an_edge_beyond_them_is_none() -> None:
    check = check_critical_curvature(lambda ps: SGD(ps, lr=1e-13), seeds=(0,), steps=1)
    assert check.measured == (math.inf, math.inf)
    assert not check.agrees


def test_each_seed_and_system_is_a_row() -> None:
    check = check_critical_curvature(lambda ps: SGD(ps, lr=0.1, momentum=0.9), seeds=(3, 4, 5), steps=2)
    assert len(check.predicted) == len(check.measured) == len(check.eigenvalues) == 6
    assert check.predicted == pytest.approx([38.0] * 6)
    assert check.optimizer == "SGD"
    assert check.linear == ("momentum_buffer",)
    assert check.rtol == 1e-6


def test_groups_of_two_rates_are_weighed_by_their_coordinates() -> None:
    """Only a right order of coordinates gives the edge that the optimizer has."""
    for order in (1, -1):

        def factory(ps: list[nn.Parameter], order: int = order) -> Optimizer:
            groups = [{"params": [p], "lr": lr} for p, lr in zip(ps, (0.1, 0.7), strict=True)]
            return SGD(groups[::order])

        check = check_critical_curvature(factory, seeds=(0, 1), steps=1)
        assert check.agrees, str(check)


class Custom(Optimizer):
    """Plain steps, and a state that ``update`` changes."""

    def __init__(self, params: Any, update: Callable[[Tensor, Tensor], Tensor], step: Any = None) -> None:
        super().__init__(params, {"lr": 0.1})
        self.update = update
        self.move = step or (lambda grad, state: grad)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                s = state.setdefault("s", torch.zeros_like(p))
                s.copy_(self.update(s, p.grad))
                p.sub_(self.move(p.grad, s), alpha=group["lr"])


@pytest.fixture
def custom(registry: None) -> None:
    register_critical_curvature(Custom)(lambda g, p, s: 2 / g["lr"])


@pytest.mark.usefixtures("custom")
@pytest.mark.parametrize(
    ("update", "linear", "adaptive"),
    [
        (lambda s, g: 0.9 * s + 0.1 * g, ("s",), ()),
        (lambda s, g: 0.9 * s + 0.1 * g * g, (), ("s",)),
        (lambda s, g: torch.maximum(s, g.abs()), (), ("s",)),
        (lambda s, g: 0.9 * s, (), ()),  # answers no gradient at all
    ],
    ids=["odd", "even", "maximum", "none"],
)
def test_state_is_told_apart_by_what_it_answers(
    update: Any, linear: tuple[str, ...], adaptive: tuple[str, ...]
) -> None:
    check = check_critical_curvature(lambda ps: Custom(ps, update), seeds=(0,), steps=5)
    assert (check.linear, check.adaptive) == (linear, adaptive)
    assert check.agrees


@pytest.mark.usefixtures("custom")
@pytest.mark.parametrize(("even", "mixed"), [(1e-11, False), (1e-7, True), (1.0, True)])
def test_state_that_answers_both_ways_is_refused(even: float, mixed: bool) -> None:
    """Gradients of the probe are 1e2 to 1e4, so that the even part is ``even`` times that: 1e-7 at most, or more."""

    def run() -> ThresholdCheck:
        return check_critical_curvature(lambda ps: Custom(ps, lambda s, g: g + even * g * g), seeds=(0,), steps=2)

    if mixed:
        with pytest.raises(RuntimeError, match="Expected state that is linear or even in the gradient, got 's'"):
            run()
    else:
        assert run().linear == ("s",)


@pytest.mark.usefixtures("custom")
@pytest.mark.parametrize(("bend", "refused"), [(1e-3, False), (1e3, True)])
def test_a_step_may_bend_by_a_millionth(bend: float, refused: bool) -> None:
    """Probes are of 1e-6, so that a quadratic part of ``bend`` · g is 1e-9 or 1e-3 of the step."""

    def run() -> ThresholdCheck:
        return check_critical_curvature(
            lambda ps: Custom(ps, lambda s, g: 0.9 * s, lambda g, s: g + bend * g * g.abs()), seeds=(0,), steps=2
        )

    if refused:
        with pytest.raises(RuntimeError, match="Expected a step that is linear .* off by"):
            run()
    else:
        assert run().agrees


@pytest.mark.usefixtures("registry")
def test_state_that_a_step_replaces_by_something_else_each_time_cannot_be_held() -> None:
    class Replaced(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    before = state.get("v", torch.ones_like(p))
                    state["v"] = (0.5 + 0.4 * torch.sin(1e6 * before)) * (1.0 + p.grad**2)
                    p.sub_(p.grad / (1.0 + state["v"]), alpha=group["lr"])

    register_critical_curvature(Replaced)(lambda g, p, s: 2 * (1 + s["v"]) / g["lr"] if "v" in s else None)
    with pytest.raises(RuntimeError, match="Expected adaptive state that can be held during a step, got 'v'"):
        check_critical_curvature(Replaced, seeds=(0,), steps=2)


@pytest.mark.usefixtures("custom")
def test_a_rule_that_says_nothing_after_the_steps_is_refused() -> None:
    register_critical_curvature(Custom)(lambda g, p, s: None)
    with pytest.raises(ValueError, match="Expected a critical curvature after 2 steps"):
        check_critical_curvature(lambda ps: Custom(ps, lambda s, g: s), seeds=(0,), steps=2)


@pytest.mark.parametrize("maximize", [False, True])
def test_maximizing_looks_for_the_edge_of_the_other_sign(maximize: bool) -> None:
    check = check_critical_curvature(lambda ps: SGD(ps, lr=0.5, maximize=maximize), seeds=(0,), steps=1)
    assert check.measured == pytest.approx((4.0, 4.0), rel=1e-7)
    assert check.agrees


def test_coupled_decay_takes_from_the_room() -> None:
    """H + wd reaches 2 / lr at λ_max(H) = 2 / lr − wd."""
    check = check_critical_curvature(lambda ps: SGD(ps, lr=0.5, weight_decay=1.0), seeds=(0,), steps=1)
    assert check.measured == pytest.approx((3.0, 3.0), rel=1e-7)
    assert check.predicted == pytest.approx((3.0, 3.0), rel=1e-7)


def test_decay_that_takes_all_the_room_is_refused() -> None:
    with pytest.raises(ValueError, match="decay that is stable by itself"):
        check_critical_curvature(lambda ps: SGD(ps, lr=0.5, weight_decay=4.0), seeds=(0,), steps=1)


def test_the_live_parameters_of_a_factory_are_its_own() -> None:
    made: list[nn.Parameter] = []

    def factory(ps: list[nn.Parameter]) -> Optimizer:
        made.extend(ps)
        return SGD(ps, lr=0.1)

    check_critical_curvature(factory, seeds=(0,), steps=3)
    assert [tuple(p.shape) for p in made] == [(1,), (1,), (3,), (2, 2)]
    assert all(p.dtype == torch.float64 for p in made)
