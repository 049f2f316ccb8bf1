"""Evaluations in another precision than the loss was written for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eos_monitor.curvature.precision import Precisions, Widened


def test_conversions_to_less_are_conversions_to_double() -> None:
    x = torch.ones(2, dtype=torch.float64) / 3
    ways: list[Callable[[], Tensor]] = [
        x.float,
        x.half,
        x.bfloat16,
        lambda: x.to(torch.float32),
        lambda: x.to(dtype=torch.bfloat16),
        lambda: torch.softmax(x, 0, dtype=torch.float32) * 2 / 3,
        lambda: torch.zeros(2, dtype=torch.float16) + x,
    ]
    for way in ways:
        with Widened():
            found = way()
        assert found.dtype == torch.float64
        assert torch.allclose(found, x, rtol=1e-15)
    with Widened():
        assert x.long().dtype == torch.int64
        assert x.to(torch.int32).dtype == torch.int32


@pytest.mark.parametrize("usual", [torch.float32, torch.float64], ids=str)
def test_draws_are_those_of_the_usual_precision(usual: torch.dtype) -> None:
    like = torch.zeros(20, dtype=torch.float64)
    draws: list[Callable[[torch.dtype], Tensor]] = [
        lambda dtype: torch.randn(20, dtype=dtype),
        lambda dtype: torch.rand_like(like.to(dtype)),
        lambda dtype: torch.empty(20, dtype=dtype).uniform_(),
        lambda dtype: torch.normal(like.to(dtype), 1.0),
    ]
    for draw in draws:
        torch.manual_seed(3)
        expected = draw(usual)
        torch.manual_seed(3)
        with Widened(usual):
            found = draw(torch.float64)
        assert found.dtype == torch.float64
        assert torch.equal(found, expected.double())


def test_the_least_precision_is_noted() -> None:
    x = torch.ones(3)
    for operation, expected in (
        (lambda: x + x, torch.float32),
        (lambda: x.double() + 1, torch.float64),
        (lambda: (x + x).half() + 1, torch.float16),
        (lambda: (x.half() + 1).bfloat16(), torch.bfloat16),
        (lambda: torch.arange(3) + 1, torch.float64),  # none at all
        (lambda: torch.stack([x.bfloat16(), x.bfloat16()]).unbind(), torch.bfloat16),
    ):
        with Precisions() as precisions:
            operation()
        assert precisions.shortest == expected
