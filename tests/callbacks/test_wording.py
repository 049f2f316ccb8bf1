"""What a run is called: its optimizers, and the learning rates that it was read at."""

from __future__ import annotations

import torch

from eos_monitor.callbacks.wording import describe_optimizers
from eos_monitor.readings.reading import StabilityReading


def reading(*lr: float) -> StabilityReading:
    return StabilityReading(step=0, loss=None, lr=lr)


def p() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(1))]


def test_a_title_tells_the_range_of_the_learning_rates() -> None:
    adamw = torch.optim.AdamW(p(), lr=1e-6)
    assert describe_optimizers([adamw], [reading(1e-6)]) == "AdamW, lr 1e-06"
    warm_up = [reading(1e-6), reading(1e-3), reading(4e-4)]
    assert describe_optimizers([adamw], warm_up) == "AdamW, lr 1e-06 to 0.001"


def test_groups_and_optimizers_have_their_own() -> None:
    groups = torch.optim.SGD([{"params": p()}, {"params": p(), "lr": 0.2}, {"params": p()}], lr=0.1)
    adam = torch.optim.Adam(p(), lr=3e-4)
    readings = [reading(0.1, 0.2, 0.1, 3e-4), reading(0.1, 0.02, 0.1, 3e-4)]
    assert describe_optimizers([groups, adam], readings) == "SGD, lr 0.1, 0.02 to 0.2 and Adam, lr 0.0003"


def test_without_rates_nothing_is_made_up() -> None:
    sgd = torch.optim.SGD(p(), lr=0.1)
    sgd.param_groups[0]["lr"] = None  # as Adafactor of transformers has it
    assert describe_optimizers([sgd], [reading()]) == "SGD, lr of its own"
