"""Losses that exchange between processes: an error where one process evaluates alone, and let through where all do."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from eos_monitor import HessianOperator
from eos_monitor.callbacks.trainer_sandbox import TrainerSandbox
from eos_monitor.isolation.exchange import ExchangeError
from eos_monitor.isolation.sandbox import Sandbox
from tests.callbacks.test_trainer_sandbox import trainer_with

X = torch.ones(3, 2)


def exchanging(module: Any, batch: Tensor) -> Tensor:
    loss = module(batch).square().mean()
    dist.all_reduce(loss.detach().clone())
    return loss


@pytest.fixture
def two_processes() -> Iterator[None]:
    """A group of two of which this is one; its collective calls return at once."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(("settings", "refused"), [({}, True), ({"alone": True}, True), ({"alone": False}, False)])
def test_one_process_cannot_exchange_alone(settings: dict[str, bool], refused: bool) -> None:
    with Sandbox(nn.Linear(2, 1), **settings) as sandbox:  # type: ignore[arg-type]
        if refused:
            with pytest.raises(ExchangeError, match="one process can evaluate alone"):
                sandbox.evaluate(exchanging, X, {})
        else:
            assert float(sandbox.evaluate(exchanging, X, {})) >= 0.0


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize("alone", [None, True, False])
def test_in_a_trainer_all_measure_together_unless_told_otherwise(alone: bool | None) -> None:
    settings = {} if alone is None else {"alone": alone}
    with TrainerSandbox(trainer_with(), nn.Linear(2, 1), **settings) as sandbox:  # type: ignore[arg-type]
        if alone:
            with pytest.raises(ExchangeError):
                sandbox.evaluate(exchanging, X, {})
        else:
            assert float(sandbox.evaluate(exchanging, X, {})) >= 0.0


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize("together", [True, False])
def test_products_exchange_where_they_are_summed(together: bool) -> None:
    torch.manual_seed(0)
    operator = HessianOperator(
        nn.Linear(2, 1), exchanging, [X], sum_over_ranks=(lambda flat: 2 * flat) if together else None
    )
    if together:
        # 2/N XᵀX over (x, 1), the same on both processes
        assert torch.allclose(operator.matvec(torch.ones(3)), torch.full((3,), 6.0))
    else:
        with pytest.raises(ExchangeError):
            operator.matvec(torch.ones(3))


def test_one_process_exchanges_as_it_likes() -> None:
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        with Sandbox(nn.Linear(2, 1)) as sandbox:
            assert float(sandbox.evaluate(exchanging, X, {})) >= 0.0
    finally:
        dist.destroy_process_group()
