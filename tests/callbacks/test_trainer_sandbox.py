"""What a loss does to its Trainer in a reading: nothing that lasts."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from eos_monitor.callbacks.trainer_sandbox import TrainerSandbox


class Loud(pl.LightningModule):
    """Logs, prints and stops in its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 1)
        self.child: Any = None

    def log(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("logged")

    log_dict = print = log

    def loss(self, x: Tensor) -> Tensor:
        self.log("a", 1)
        self.log_dict({"a": 1})
        self.print("a")
        return self.body(x).square().mean()


class Rows(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []
        self.count = 3
        self.inner = SimpleNamespace(rows=self.rows, deeper=SimpleNamespace(add=self.rows.append))

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.rows.append(args)


def trainer_with(*loggers: Any, should_stop: bool = False, contexts: list[str] | None = None) -> Any:
    def forward_context() -> Any:
        if contexts is not None:
            contexts.append("entered")
        return nullcontext()

    plugin = SimpleNamespace(forward_context=forward_context)
    return SimpleNamespace(_loggers=list(loggers), should_stop=should_stop, precision_plugin=plugin)


def evaluate(trainer: Any, module: nn.Module, loss_fn: Any) -> Any:
    with TrainerSandbox(trainer, module) as sandbox:
        return sandbox.evaluate(loss_fn, torch.ones(3, 2), {})


@pytest.mark.parametrize("before", [False, True])
def test_a_loss_that_wants_to_stop_does_not(before: bool) -> None:
    trainer = trainer_with(should_stop=before)

    def loss(module: Any, x: Tensor) -> Tensor:
        trainer.should_stop = not before
        return module.loss(x)

    evaluate(trainer, Loud(), loss)
    assert trainer.should_stop is before


@pytest.mark.parametrize("before", [False, True])
def test_nor_does_one_that_fails(before: bool) -> None:
    logger = Rows()
    trainer = trainer_with(logger, should_stop=before)

    def loss(module: Any, x: Tensor) -> Tensor:
        trainer.should_stop = not before
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        evaluate(trainer, Loud(), loss)
    assert trainer.should_stop is before
    assert trainer._loggers[0] is logger


def test_what_is_decided_between_two_readings_stays() -> None:
    trainer = trainer_with()
    sandbox = TrainerSandbox(trainer, Loud())
    with sandbox:
        trainer.should_stop = True
    assert trainer.should_stop is False
    trainer.should_stop = True
    with sandbox:
        trainer.should_stop = False
    assert trainer.should_stop is True


def test_a_module_inside_is_silent_too_and_speaks_again_after() -> None:
    outer = Loud()
    outer.child = Loud()

    def loss(module: Any, x: Tensor) -> Tensor:
        return module.loss(x) + module.child.loss(x)

    evaluate(trainer_with(), outer, loss)
    for module in (outer, outer.child):
        with pytest.raises(AssertionError, match="logged"):
            module.log("a", 1)


def test_a_module_that_only_happens_to_print_does_print() -> None:
    class Printer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 1)

        def print(self) -> float:
            return 5.0

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).sum() * 0.0 + self.print()

    assert float(evaluate(trainer_with(), Printer(), lambda m, x: m(x))) == 5.0


def test_loggers_are_what_they_were_and_take_nothing(tmp_path: Any) -> None:
    rows = Rows()
    csv = CSVLogger(tmp_path)
    trainer = trainer_with(rows, csv)
    held = trainer._loggers

    def loss(module: Any, x: Tensor) -> Tensor:
        first, second = trainer._loggers
        assert isinstance(first, Rows)
        assert isinstance(second, CSVLogger)
        assert (first.count, first.version, second.save_dir) == (3, rows.version, str(tmp_path))
        first.log_metrics({"a": 1})
        first.inner.deeper.add(1)
        first.count = 4
        second.log_hyperparams({"a": 1})
        return module.loss(x)

    evaluate(trainer, Loud(), loss)
    assert trainer._loggers is held
    assert held[0] is rows
    assert (rows.rows, rows.count) == ([], 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mixed", [False, True])
def test_the_trainers_autocast_is_entered_where_types_must_meet(mixed: bool) -> None:
    contexts: list[str] = []
    module = Loud()
    if mixed:
        module.child = nn.Linear(2, 1).bfloat16()
    evaluate(trainer_with(contexts=contexts), module, lambda m, x: m.loss(x))
    assert contexts == (["entered"] if mixed else [])


def test_its_evaluations_have_the_seed_of_the_sandbox() -> None:
    drop = nn.Dropout(0.5)
    found = []
    for seed in (0, 0, 1):
        with TrainerSandbox(trainer_with(), drop, seed=seed) as sandbox:
            found.append(sandbox.evaluate(lambda m, x: m(x), torch.ones(100), {}))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
