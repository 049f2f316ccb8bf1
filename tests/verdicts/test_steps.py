"""What reaches the detector, and in which order."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eos_monitor.verdicts.steps import StepBuffer, follows, kind_of


class Taken(list):
    def __call__(self, step: int, **inputs: Any) -> None:
        self.append((step, inputs))

    def of(self, key: str) -> list[tuple[int, Any]]:
        return [(step, inputs[key]) for step, inputs in self if inputs.get(key) is not None]


def a_parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(4))


def run(steps: StepBuffer, p: nn.Parameter, count: int, *, lr: Any = lambda step: 0.1, micro: int = 1) -> None:
    for step in range(count):
        for part in range(micro):
            steps.add_loss(torch.tensor(float(step + part)))
        steps.begin(step, lambda step=step: {"lr": (lr(step),)})
        with torch.no_grad():
            p.mul_(0.5)
        steps.end(step)


def several(**settings: Any) -> dict[str, Any]:
    """Two processes, of which the other has losses three times as large."""

    def total(flat: Tensor) -> Tensor:
        n = len(flat) // 2
        return torch.cat([flat[:n] * 4, flat[n:] * 2])

    return {"processes": 2, "sum_over_ranks": total, **settings}


def test_everything_arrives_at_once_on_one_processor() -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=True)
    steps.project_on(torch.ones(4), [p])
    run(steps, p, 3)
    assert taken.of("loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert taken.of("lr") == [(0, (0.1,)), (1, (0.1,)), (2, (0.1,))]
    # The update of a step arrives with the next one: 1 -> 1/2 -> 1/4 in four entries.
    assert taken.of("projection") == [(1, pytest.approx(-2.0)), (2, pytest.approx(-1.0))]
    assert [step for step, _ in taken.of("relative_update")] == [1, 2]
    assert taken.of("relative_update")[0][1] == pytest.approx(1.0)
    # New settings are handed on before the loss of the same step, old ones with it.
    assert [sorted(inputs.keys() & {"lr", "loss"}) for _, inputs in taken] == [["lr"], ["loss"], *[["loss", "lr"]] * 2]


def test_losses_of_micro_batches_are_averaged() -> None:
    p, taken = a_parameter(), Taken()
    run(StepBuffer([p], taken, movements=False), p, 2, micro=3)
    assert taken.of("loss") == [(0, 1.0), (1, 2.0)]
    assert not taken.of("relative_update")


def test_over_processes_losses_are_means_and_come_in_lots() -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False, **several())
    run(steps, p, 63)
    assert not taken
    run_on = StepBuffer([p], taken, movements=False, **several())
    run(run_on, p, 64)
    assert taken.of("loss") == [(step, 2.0 * step) for step in range(64)]
    assert [step for step, _ in taken] == list(range(64))


def test_a_fast_rise_of_the_learning_rate_does_not_wait() -> None:
    p, taken = a_parameter(), Taken()
    run(StepBuffer([p], taken, movements=False, **several()), p, 6, lr=lambda step: 0.5 if step >= 5 else 0.1)
    assert taken.of("lr")[-1] == (5, (0.5,))
    assert taken.of("loss")[-1] == (4, 8.0)


def test_a_rise_that_is_foreseen_does_not_wait_either() -> None:
    taken, p = Taken(), a_parameter()
    steps = StepBuffer([p], taken, movements=False, **several())
    steps.begin(0, lambda: {"lr": (0.1,), "lr_ahead": 0.2})
    assert taken.of("lr_ahead") == [(0, 0.2)]


def test_lots_on_the_cpu_wait_and_a_loss_that_is_not_finite_does_not() -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=True, buffered=8)
    run(steps, p, 7)
    assert not taken
    steps.add_loss(torch.tensor(math.nan))
    steps.begin(7, dict)
    steps.end(7)
    assert [step for step, _ in taken.of("loss")][:7] == list(range(7))
    run(StepBuffer([p], taken, movements=False, buffered=8), p, 4, lr=lambda step: 0.5 if step == 3 else 0.1)
    assert taken.of("lr")[-1] == (3, (0.5,))


def test_a_whole_loss_is_handed_on_once() -> None:
    taken, p = Taken(), a_parameter()
    steps = StepBuffer([p], taken, movements=False)
    for step in range(3):
        steps.end(step - 1)
        steps.begin(step, lambda: {"lr": (0.1,)})
        steps.add_loss(float(step), whole=True)
        assert taken.of("loss")[-1] == (step, float(step))
    steps.end(2)
    assert len(taken.of("loss")) == 3
    assert len(taken) == 4  # the first learning rate came alone


def test_a_process_without_a_loss_keeps_the_count() -> None:
    p, taken = a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=False, processes=2, sum_over_ranks=lambda flat: flat)
    for step in range(64):
        steps.end(step)
        steps.end(step)  # asked twice
    assert [step for step, _ in taken] == list(range(64))
    assert not taken.of("loss")


def test_failures_stay_inside_and_are_told() -> None:
    p = a_parameter()

    def fails(step: int, **inputs: Any) -> None:
        raise RuntimeError("on purpose")

    with pytest.warns(UserWarning, match="on purpose"):
        run(StepBuffer([p], fails, movements=True), p, 5)


def test_updates_that_are_too_dear_are_not_followed_and_it_is_told() -> None:
    p, taken, told = a_parameter(), Taken(), []
    run(StepBuffer([p], taken, max_overhead=1e-9, tell=told.append), p, 70)
    assert len(told) == 1
    assert "not followed" in told[0]
    assert max(step for step, _ in taken.of("relative_update")) == 63
    taken.clear()
    run(StepBuffer([p], taken, movements=True, max_overhead=1e-9, tell=told.append), p, 70)
    assert max(step for step, _ in taken.of("relative_update")) == 69
    assert len(told) == 1


def test_parameters_that_are_thawed_later_are_followed() -> None:
    p, q, taken = a_parameter(), a_parameter(), Taken()
    steps = StepBuffer([p], taken, movements=True)
    run(steps, p, 2)
    steps.project_on(torch.ones(8), [p, q])
    steps.begin(2, dict)
    with torch.no_grad():
        q.add_(1.0)
    steps.end(2)
    steps.begin(3, dict)
    steps.end(3)
    assert taken.of("projection")[-1] == (3, pytest.approx(4.0))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda ps: torch.optim.SGD(ps, lr=1.0), ("sgd", 0.0)),
        (lambda ps: torch.optim.SGD(ps, lr=1.0, momentum=0.9), ("sgd", 0.9)),
        (lambda ps: torch.optim.SGD(ps, lr=1.0, momentum=0.8, nesterov=True), ("nesterov", 0.8)),
        (lambda ps: torch.optim.AdamW(ps, betas=(0.95, 0.99)), ("adam", 0.95)),
        (lambda ps: torch.optim.RMSprop(ps, momentum=0.3), ("adam", 0.3)),
        (torch.optim.Adagrad, ("adam", 0.0)),
        (torch.optim.Adadelta, ("adam", 0.0)),
        (torch.optim.Adafactor, ("adam", 0.0)),
        (torch.optim.ASGD, ("sgd", 0.0)),
    ],
    ids=["sgd", "momentum", "nesterov", "adamw", "rmsprop", "adagrad", "adadelta", "adafactor", "asgd"],
)
def test_kind_of_optimizers(build: Any, expected: tuple[str, float]) -> None:
    assert kind_of([build([a_parameter()])]) == dict(zip(("family", "momentum"), expected, strict=True))


def test_time_that_readings_take_does_not_make_following_updates_look_cheap() -> None:
    p, taken = a_parameter(), Taken()
    # Next to the hours that pass on the clock of the training anything is cheap; where that stands still, nothing is.
    for seconds, last in ((lambda: 0.0, 63), (iter(range(0, 10**6, 3600)).__next__, 69)):
        taken.clear()
        run(StepBuffer([p], taken, training_seconds=seconds), p, 70)
        assert max(step for step, _ in taken.of("relative_update")) == last


def large_parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(1, device="meta").expand(1 << 25), requires_grad=False)


def test_a_cadence_does_not_force_updates_of_large_nets_to_be_followed() -> None:
    assert follows(None, [a_parameter()], exact=True) is True
    assert follows(None, [large_parameter()], exact=True) is None  # if it fits into the budget
    assert follows(True, [large_parameter()], exact=True) is True
    assert follows(False, [a_parameter()], exact=True) is False
    assert follows(None, [a_parameter()], exact=False) is None


def test_a_large_net_is_given_up_before_the_trial_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    p, taken, told = a_parameter(), Taken(), []
    monkeypatch.setattr("eos_monitor.verdicts.steps._SMALL", 3)
    run(StepBuffer([p], taken, max_overhead=1e-9, tell=told.append), p, 20)
    assert len(told) == 1
    assert max(step for step, _ in taken.of("relative_update")) == 3
