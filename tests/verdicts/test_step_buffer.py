"""The order, the lots and the means of what steps bring, and when it is too dear."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eos_monitor.readings.guard import Guard
from eos_monitor.verdicts.steps import BUFFERED, StepBuffer, kind_of


class Taken(list):
    def __call__(self, step: int, **inputs: Any) -> None:
        self.append((step, inputs))

    def of(self, key: str) -> list[tuple[int, Any]]:
        return [(step, inputs[key]) for step, inputs in self if inputs.get(key) is not None]


def a_parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values or (1.0, 1.0)))


def one_step(
    steps: StepBuffer, p: nn.Parameter, step: int, *, by: float = 1.0, loss: float | None = None, **settings: Any
) -> None:
    steps.begin(step, lambda: settings)
    if loss is not None:
        steps.add_loss(torch.tensor(loss))
    with torch.no_grad():
        p.add_(by)
    steps.end(step)


# Learning rates that do not wait.


@pytest.mark.parametrize(
    ("rates", "waits"),
    [
        ([(0.1,), (0.139,)], True),
        ([(0.1,), (0.141,)], False),
        ([(0.1, 0.1), (0.1, 0.141)], False),  # any group
        ([(0.1, 0.1), (0.05, 0.05)], True),  # a fall can wait
        ([(0.0,), (1.0,)], True),  # from nothing there is no factor
    ],
)
def test_a_rate_that_rises_by_14_does_not_wait(rates: list[tuple[float, ...]], waits: bool) -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False, buffered=8)
    for step, lr in enumerate(rates):
        steps.begin(step, lambda lr=lr: {"lr": lr})
        if step < len(rates) - 1:
            steps.end(step)
    assert taken.of("lr") == ([] if waits else list(enumerate(rates)))


@pytest.mark.parametrize(("ahead", "waits"), [(0.139, True), (0.141, False), (None, True)])
def test_nor_does_one_that_is_foreseen(ahead: float | None, waits: bool) -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False, buffered=8)
    steps.begin(0, lambda: {"lr": (0.1,), "lr_ahead": ahead})
    assert (taken == []) is waits


def test_without_a_rate_nothing_is_foreseen() -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False, buffered=8)
    steps.begin(0, lambda: {"lr_ahead": 5.0})
    assert not taken


def test_unbuffered_a_new_rate_comes_at_once_and_one_that_stays_with_the_loss() -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False)
    for step, lr in enumerate([0.1, 0.1, 0.05]):
        steps.begin(step, lambda lr=lr: {"lr": (lr,)})
        assert len(taken.of("lr")) == [1, 1, 3][step]
        steps.add_loss(torch.tensor(float(step)))
        steps.end(step)
    assert taken.of("lr") == [(0, (0.1,)), (1, (0.1,)), (2, (0.05,))]
    assert taken.of("loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_the_first_call_of_a_step_counts() -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False)
    steps.begin(0, lambda: {"lr": (0.1,)})
    steps.begin(1, lambda: {"lr": (0.9,)})
    steps.end(0)
    steps.end(0)
    assert taken == [(0, {"lr": (0.1,)})]


# Lots.


@pytest.mark.parametrize(("buffered", "processes", "lot"), [(1, 1, 1), (2, 1, 2), (5, 1, 5), (5, 2, BUFFERED)])
def test_steps_are_passed_on_in_lots(buffered: int, processes: int, lot: int) -> None:
    p, taken = a_parameter(), Taken()
    several = {"processes": 2, "sum_over_ranks": lambda flat: flat} if processes > 1 else {}
    steps = StepBuffer([p], taken, movements=False, buffered=buffered, **several)
    for step in range(2 * lot):
        one_step(steps, p, step, loss=float(step))
        assert len(taken.of("loss")) == (step + 1) // lot * lot
    assert [loss for _, loss in taken.of("loss")] == list(range(2 * lot))


def test_what_waits_is_passed_on_when_asked() -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=True, buffered=8)
    for step in range(3):
        one_step(steps, p, step, loss=float(step), lr=(0.1,))
    assert not taken
    steps.flush()
    assert [step for step, _ in taken] == [0, 1, 2]
    assert taken.of("loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    # (1, 1) moves by (1, 1) to (2, 2), and from there to (3, 3): told with the step after
    assert taken.of("relative_update") == [(1, pytest.approx(1 / 2)), (2, pytest.approx(1 / 3))]
    steps.flush()
    assert len(taken) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_a_lot(value: float) -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False, buffered=8)
    one_step(steps, p, 0, loss=1.0)
    assert not taken
    one_step(steps, p, 1, loss=value)
    assert [step for step, _ in taken] == [0, 1]


def test_catching_up_passes_on_a_loss_that_is_whole_and_no_other() -> None:
    for whole in (True, False):
        p, taken = a_parameter(), Taken()
        steps = StepBuffer([p], taken, movements=False, buffered=8)
        one_step(steps, p, 0, loss=1.0)
        steps.begin(1, lambda: {"lr": (0.1,)})
        steps.add_loss(2.0, whole=whole)
        steps.catch_up()
        assert taken.of("loss") == [(0, 1.0), (1, 2.0)][: 2 if whole else 1]
        steps.end(1)
        steps.flush()
        assert taken.of("loss") == [(0, 1.0), (1, 2.0)]
        assert taken.of("lr") == [(1, (0.1,))]


# Losses.


@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0])
def test_the_loss_of_a_step_is_the_mean_over_its_parts_times_their_factor(factor: float) -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False)
    for step in range(2):
        steps.begin(step, dict)
        for loss in (1.0 + step, 2.0, torch.tensor(6.0, requires_grad=True)):
            steps.add_loss(loss, factor)
        steps.end(step)
    assert taken.of("loss") == [(0, pytest.approx(3.0 * factor)), (1, pytest.approx(10 / 3 * factor))]


def test_a_step_without_a_loss_has_none() -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False)
    one_step(steps, p, 0, loss=1.0)
    one_step(steps, p, 1, lr=(0.1,))
    one_step(steps, p, 2)
    assert taken == [(0, {"loss": 1.0}), (1, {"lr": (0.1,)})]


def test_losses_are_means_over_the_processes_that_have_one() -> None:
    """Of two processes the other has 3, nothing and 5 where this one has 1, 2 and nothing."""
    other = np.array([3.0, 0.0, 5.0] + [0.0] * (BUFFERED - 3))
    known = np.array([1.0, 0.0, 1.0] + [0.0] * (BUFFERED - 3))
    p, taken = a_parameter(), Taken()
    steps = StepBuffer(
        [p],
        taken,
        movements=False,
        processes=2,
        sum_over_ranks=lambda flat: flat + torch.tensor(np.concatenate([other, known])),
    )
    for step in range(BUFFERED):
        one_step(steps, p, step, loss={0: 1.0, 1: 2.0}.get(step))
    assert taken.of("loss") == [(0, 2.0), (1, 2.0), (2, 5.0)]
    assert [step for step, _ in taken] == list(range(BUFFERED))  # all count the same steps


# Updates.


def test_projections_are_on_what_was_last_given() -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=True)
    for step, w in enumerate(([1.0, 0.0], [1.0, 3.0], None)):
        steps.project_on(None if w is None else torch.tensor(w), [p])
        one_step(steps, p, step, by=2.0)
    one_step(steps, p, 3)
    assert taken.of("projection") == [(1, pytest.approx(2.0)), (2, pytest.approx(8.0))]
    assert [step for step, _ in taken.of("relative_update")] == [1, 2, 3]


@pytest.mark.parametrize(("movements", "params"), [(False, True), (True, False), (None, False)])
def test_nothing_is_followed_where_nobody_wants_it_or_nothing_moves(movements: bool | None, params: bool) -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p] if params else [], taken, movements=movements)
    steps.project_on(torch.ones(2), [p])
    for step in range(3):
        one_step(steps, p, step, loss=1.0)
    assert not taken.of("relative_update")
    assert not taken.of("projection")


@pytest.mark.parametrize(("budget", "kept"), [(1e-12, False), (1e12, True)])
@pytest.mark.parametrize("movements", [True, None])
def test_updates_are_followed_on_trial_for_64_steps(budget: float, kept: bool, movements: bool | None) -> None:
    p, taken, told = a_parameter(), Taken(), []
    steps = StepBuffer([p], taken, movements=movements, max_overhead=budget, tell=told.append)
    for step in range(80):
        one_step(steps, p, step)
    stays = kept or movements is True
    assert max(step for step, _ in taken.of("relative_update")) == (79 if stays else 63)
    assert len(told) == (0 if stays else 1)


def test_the_first_process_decides_for_all() -> None:
    for first in (True, False):
        p, taken, told = a_parameter(), Taken(), []
        steps = StepBuffer([p], taken, max_overhead=1e12, from_first=lambda value, first=first: first, tell=told.append)
        for step in range(70):
            one_step(steps, p, step)
        assert len(told) == int(first)


@pytest.mark.parametrize(("seconds", "kept"), [(0.9, False), (1.1, True)])
def test_a_quarter_of_the_budget_may_go_into_it(seconds: float, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at the projector takes 1/128 s on this clock: two a step, 64 steps, so 1 s of training that takes 4."""
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1 / 128
        return clock[0]

    monkeypatch.setattr("eos_monitor.verdicts.steps.time", SimpleNamespace(perf_counter=tick))
    p, taken, told = a_parameter(), Taken(), []
    training = [0.0]
    steps = StepBuffer([p], taken, max_overhead=1.0, training_seconds=lambda: training[0], tell=told.append)
    for step in range(64):
        training[0] = 4.0 * seconds * (step == 63)
        one_step(steps, p, step)
    assert (told == []) is kept


def test_a_failure_is_told_once_and_the_losses_go_on() -> None:
    p, seen = a_parameter(), []

    def consumer(step: int, **inputs: Any) -> None:
        seen.append(step)
        if step == 1:
            raise RuntimeError("on purpose")

    guard = Guard()
    steps = StepBuffer([p], consumer, movements=False, guard=guard)
    one_step(steps, p, 0, loss=1.0)
    with pytest.warns(UserWarning, match="on purpose"):
        one_step(steps, p, 1, loss=1.0)
    for step in (2, 3):
        one_step(steps, p, step, loss=1.0)
    assert seen == [0, 1, 2, 3]


def test_a_failure_among_several_processes_is_not_swallowed() -> None:
    """The others would wait for what this one no longer sends."""

    def consumer(step: int, **inputs: Any) -> None:
        raise RuntimeError("on purpose")

    guard = Guard()
    guard.alone = False
    p = a_parameter()
    with pytest.raises(RuntimeError, match="on purpose"):
        one_step(StepBuffer([p], consumer, movements=False, guard=guard), p, 0, loss=1.0)


# What optimizers are.


def with_groups(*groups: dict[str, Any]) -> Any:
    return SimpleNamespace(param_groups=list(groups))


@pytest.mark.parametrize(
    ("optimizers", "expected"),
    [
        ([], ("sgd", 0.0)),
        ([with_groups()], ("sgd", 0.0)),
        ([with_groups({"momentum": 0.9}, {"momentum": 0.1, "betas": (0.9, 0.99)})], ("sgd", 0.9)),
        ([with_groups({"betas": [0.8, 0.9]})], ("adam", 0.8)),
        ([with_groups({"betas": None, "momentum": 0.3})], ("sgd", 0.3)),
        ([with_groups({"betas": ()})], ("adam", 0.0)),
        ([with_groups({"momentum": 1.0})], ("sgd", 0.0)),
        ([with_groups({"momentum": -0.1})], ("sgd", 0.0)),
        ([with_groups({"momentum": math.nan})], ("sgd", 0.0)),
        ([with_groups({"momentum": None, "nesterov": True})], ("nesterov", 0.0)),
        ([with_groups({"nesterov": True, "rho": 0.9})], ("adam", 0.0)),
        ([with_groups({"beta2_decay": -0.8})], ("adam", 0.0)),
    ],
)
def test_the_first_group_speaks_for_all(optimizers: list[Any], expected: tuple[str, float]) -> None:
    assert kind_of(optimizers) == {"family": expected[0], "momentum": expected[1]}


def test_a_tensor_of_a_lot_is_read_in_one_go() -> None:
    """Losses of several types and shapes of one element."""
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False, buffered=4)
    losses: list[Tensor | None] = [
        torch.tensor([1.5]),
        None,
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor([[0.5]]),
    ]
    for step, loss in enumerate(losses):
        steps.begin(step, lambda step=step: {"lr": (1.0 + 0.01 * step,)})
        if loss is not None:
            steps.add_loss(loss)
        steps.end(step)
    assert taken.of("loss") == [(0, 1.5), (2, 2.5), (3, 0.5)]
    assert [step for step, _ in taken.of("lr")] == [0, 1, 2, 3]
