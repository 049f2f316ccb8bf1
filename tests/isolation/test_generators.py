"""The generators that a module's code can draw from are found wherever they are kept, and nothing is drawn."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from eos_monitor.isolation.generators import Generators

GLOBAL = np.random.default_rng(0)
DEEP = random.Random(0)


def deeper() -> float:
    return DEEP.random()


def by_a_function() -> float:
    return deeper()


class Draws(nn.Module):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.draw()


class Holder:
    def __init__(self) -> None:
        self.inside = [torch.Generator().manual_seed(0)]

    def __call__(self) -> Any:
        return torch.rand(1, generator=self.inside[0])


def closure() -> Callable[[], Any]:
    own = np.random.RandomState(0)
    return lambda: own.rand()


WAYS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(1),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "python": lambda: random.random(),
    "a global": lambda: GLOBAL.random(),
    "a function of a function": by_a_function,
    "an object": Holder(),
    "a closure": closure(),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_draw_is_seen_wherever_the_generator_is(way: str) -> None:
    module = Draws(WAYS[way])
    generators = Generators(module)
    before = generators.states()
    assert generators.states() == before
    module(torch.zeros(1))
    assert generators.states() != before


def test_what_draws_nothing_leaves_them() -> None:
    module = Draws(lambda: 1.0)
    generators = Generators(module)
    before = generators.states()
    module(torch.zeros(1))
    assert generators.states() == before
