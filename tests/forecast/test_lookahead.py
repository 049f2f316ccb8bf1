"""What schedulers will set, against real runs of them and of a Trainer; the ratio there, against readings."""

from __future__ import annotations

import functools
import math
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from eos_monitor.forecast.lookahead import Position, Scheduled, SettingsAhead, edge_ratio_at
from eos_monitor.limits.thresholds import CriticalCurvature
from eos_monitor.readings.gauge import Gauge, measure_stability
from eos_monitor.readings.reading import Measurement
from eos_monitor.readings.settings import Solver

STEPS = 100


class CountingFactor:
    """A callable that ignores what it is given and counts its calls, as stateful schedules do."""

    def __init__(self) -> None:
        self.calls, self.seen = 0, [0]

    def __call__(self, _: int) -> float:
        self.calls += 1
        self.seen[0] += 1
        return 0.97**self.calls


class Jitter:
    def __init__(self) -> None:
        self.own = random.Random(3)

    def __call__(self, _: int) -> float:
        return self.own.uniform(0.9, 1.1)


class Owner(nn.Module):
    """A module with a method as schedule, too dear to be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.warmup = 10

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the module was copied")

    def factor(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup)


class EveryThird(LRScheduler):
    """A user's subclass with state of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.history: list[float] = []
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        self.history.append(float(self.optimizer.param_groups[0]["lr"]))
        return [g["lr"] * (0.9 if len(self.history) % 3 == 0 else 1.0) for g in self.optimizer.param_groups]


class Wrapped(LRScheduler):
    """A scheduler that hands over to another one, the way warm-up packages do it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.after = torch_schedulers.CosineAnnealingLR(optimizer, 50)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [base * min(1.0, (self.last_epoch + 1) / 8) for base in self.base_lrs]

    def step(self, epoch: Any = None) -> None:
        if self.last_epoch < 7:
            super().step()
        else:
            self.last_epoch += 1
            self.after.step()


def closure_counter() -> Callable[[int], float]:
    calls = 0

    def factor(_: int) -> float:
        nonlocal calls
        calls += 1
        return 0.98**calls

    return factor


def sequential(o: Optimizer) -> LRScheduler:
    warm = torch_schedulers.LinearLR(o, 0.1, total_iters=12)
    return torch_schedulers.SequentialLR(o, [warm, torch_schedulers.CosineAnnealingLR(o, 60)], milestones=[12])


def chained(o: Optimizer) -> LRScheduler:
    return torch_schedulers.ChainedScheduler(
        [torch_schedulers.ConstantLR(o, 0.5, total_iters=20), torch_schedulers.ExponentialLR(o, 0.98)]
    )


def one_cycle(o: Optimizer, **kwargs: Any) -> LRScheduler:
    return torch_schedulers.OneCycleLR(o, max_lr=[0.2, 0.05], total_steps=STEPS, **kwargs)


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "lambda": lambda o: torch_schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "lambda-callable": lambda o: torch_schedulers.LambdaLR(o, CountingFactor()),
    "lambda-closure": lambda o: torch_schedulers.LambdaLR(o, [closure_counter(), closure_counter()]),
    "lambda-method": lambda o: torch_schedulers.LambdaLR(o, Owner().factor),
    "lambda-partial": lambda o: torch_schedulers.LambdaLR(o, functools.partial(lambda a, step: a**step, 0.95)),
    "lambda-random": lambda o: torch_schedulers.LambdaLR(o, Jitter()),
    "multiplicative": lambda o: torch_schedulers.MultiplicativeLR(o, CountingFactor()),
    "step": lambda o: torch_schedulers.StepLR(o, 7),
    "multi-step": lambda o: torch_schedulers.MultiStepLR(o, [5, 30, 30], 0.3),
    "constant": lambda o: torch_schedulers.ConstantLR(o, 0.1, total_iters=9),
    "linear": lambda o: torch_schedulers.LinearLR(o, 0.1, total_iters=40),
    "exponential": lambda o: torch_schedulers.ExponentialLR(o, 0.95),
    "polynomial": lambda o: torch_schedulers.PolynomialLR(o, total_iters=50, power=2.0),
    "cosine": lambda o: torch_schedulers.CosineAnnealingLR(o, 30),
    "warm-restarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, 10, 2),
    "cyclic": lambda o: torch_schedulers.CyclicLR(o, 0.01, [0.1, 0.2], step_size_up=11, mode="triangular2"),
    "cyclic-exp": lambda o: torch_schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=11, mode="exp_range", gamma=0.99),
    "cyclic-own": lambda o: torch_schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=11, scale_fn=CountingFactor()),
    "one-cycle": one_cycle,
    "one-cycle-phases": lambda o: one_cycle(o, three_phase=True, anneal_strategy="linear"),
    "sequential": sequential,
    "chained": chained,
    "swa": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=15),
    "subclass": EveryThird,
    "wrapper": Wrapped,
}
OPTIMIZERS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "sgd": lambda groups: SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: Adam(groups, lr=0.1),
    # lr as a tensor is changed in place, so that sharing it would move the live one.
    "tensor-lr": lambda groups: AdamW(groups, lr=torch.tensor(0.1, dtype=torch.float64)),
}


def two_groups(build: Callable[[list[Any]], Optimizer]) -> Optimizer:
    x, y = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = build([{"params": [x]}, {"params": [y]}])
    if not isinstance(optimizer.param_groups[1]["lr"], Tensor):
        optimizer.param_groups[1]["lr"] = 0.025
    return optimizer


def train(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


def live_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {
            "lr": float(g["lr"]),
            "momentum": g.get("momentum"),
            "betas": tuple(float(beta) for beta in g["betas"]) if "betas" in g else None,
        }
        for g in optimizer.param_groups
    ]


def predicted(settings: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: new.get(key, old[key]) for key in old} for new, old in zip(settings, now, strict=True)]


def taken_apart(value: Any, seen: dict[int, int]) -> Any:
    """Everything reachable from ``value`` that a schedule may hold, with the identity of each object."""
    if isinstance(value, (bool, int, float, str, bytes, type(None), type)):
        return value
    if id(value) in seen:
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    inside: Any
    if isinstance(value, Tensor):
        inside = (value.tolist(), value._version)
    elif isinstance(value, dict):
        inside = [(taken_apart(k, seen), taken_apart(v, seen)) for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        inside = [taken_apart(item, seen) for item in value]
    elif isinstance(value, types.FunctionType):
        inside = [taken_apart(cell.cell_contents, seen) for cell in value.__closure__ or ()]
    elif isinstance(value, types.MethodType):
        inside = taken_apart(value.__self__, seen)
    elif isinstance(value, random.Random):
        inside = value.getstate()
    else:
        inside = taken_apart(vars(value), seen) if hasattr(value, "__dict__") else None
    return (id(value), inside)


def generators() -> tuple[Any, ...]:
    state = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), state[1].tolist(), state[2], random.getstate()


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_predicted_settings_are_reached_and_nothing_is_touched(name: str, optimizer_name: str) -> None:
    optimizer = two_groups(OPTIMIZERS[optimizer_name])
    scheduler = SCHEDULERS[name](optimizer)
    ahead = SettingsAhead([scheduler], [optimizer])
    for _ in range(3):  # a twin of a scheduler that is under way, too
        train(optimizer)
        scheduler.step()
    live = (scheduler, optimizer)
    before = taken_apart(live, {}), generators()
    now = live_settings(optimizer)
    last = STEPS - 3 if name.startswith("one-cycle") else STEPS
    expected = {n: ahead.after(n, Position(3)) for n in range(last + 1)}
    rates = ahead.rates(last, Position(3))
    assert (taken_apart(live, {}), generators()) == before
    assert rates == [settings[0][0]["lr"] for n, settings in expected.items() if n and settings is not None]
    for n in range(last + 1):
        settings = expected[n]
        assert settings is not None, ahead.why_not
        assert all(group["steps_ahead"] == n for group in settings[0])
        assert predicted(settings[0], now) == live_settings(optimizer), n
        if n < last:
            train(optimizer)
            scheduler.step()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_twin_serves_many_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = two_groups(OPTIMIZERS["sgd"])
    scheduler = SCHEDULERS[name](optimizer)
    ahead = SettingsAhead([scheduler], [optimizer])
    built, build = [], SettingsAhead._predict
    monkeypatch.setattr(SettingsAhead, "_predict", lambda *args: (built.append(1), build(*args))[1])
    for step in range(STEPS):
        settings = ahead.after(1, Position(step))
        now = live_settings(optimizer)
        assert settings is not None
        train(optimizer)
        scheduler.step()
        assert predicted(settings[0], now) == live_settings(optimizer)
    # Runs of 1, 2, 4, 8, 16, 32, 64 steps cover 127; each starts one step before the one before it ends.
    assert len(built) <= 8


MANY = {
    "one-cycle": lambda opt: torch_schedulers.OneCycleLR(opt, [0.1 * (1 + i % 3) for i in range(12)], total_steps=300),
    "cosine": lambda opt: torch_schedulers.CosineAnnealingLR(opt, T_max=50),
    "sequential": lambda opt: torch_schedulers.SequentialLR(
        opt, [torch_schedulers.LinearLR(opt, 0.1, total_iters=5), torch_schedulers.StepLR(opt, 3)], milestones=[5]
    ),
    "lambda": lambda opt: torch_schedulers.LambdaLR(
        opt, [functools.partial(pow, 0.9 + 0.01 * (i % 3)) for i in range(12)]
    ),
}


def many_groups(groups: int) -> Adam:
    """Three kinds of groups that take turns."""
    return Adam([{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1 * (1 + i % 3)} for i in range(groups)])


@pytest.mark.parametrize("name", MANY)
def test_groups_that_are_scheduled_alike_are_each_foreseen(name: str) -> None:
    optimizer = many_groups(12)
    scheduler = MANY[name](optimizer)
    ahead = SettingsAhead([scheduler], [optimizer])
    for step in range(40):
        settings = ahead.after(1, Position(step))
        rates = ahead.rates(3, Position(step))
        now = live_settings(optimizer)
        if step == 20:
            optimizer.param_groups[4]["weight_decay"] = 0.01  # no longer like the others
            continue
        assert settings is not None
        train(optimizer)
        scheduler.step()
        assert predicted(settings[0], now) == live_settings(optimizer)
        assert rates[0] == optimizer.param_groups[0]["lr"]


def test_looking_ahead_at_each_step_does_not_grow_with_the_groups() -> None:
    """In calls of Python functions, which are the same in each run."""

    def calls(groups: int) -> int:
        optimizer = many_groups(groups)
        rates = [0.1 * (1 + i) for i in range(groups)]  # all of them different
        scheduler = torch_schedulers.OneCycleLR(optimizer, rates, total_steps=1000)
        ahead = SettingsAhead([scheduler], [optimizer])
        count = 0

        def called(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call"

        for step in range(150):
            sys.setprofile(called)
            ahead.rates(8, Position(step))
            sys.setprofile(None)
            train(optimizer)
            scheduler.step()
        return count

    assert calls(40) < 2 * calls(2)  # copies of the groups, every 64 steps, and not each group at each step


def test_several_optimizers_each_have_their_schedule() -> None:
    first, second = two_groups(OPTIMIZERS["sgd"]), two_groups(OPTIMIZERS["adam"])
    schedulers = [torch_schedulers.StepLR(second, 2), torch_schedulers.ExponentialLR(first, 0.5)]
    ahead = SettingsAhead(schedulers, [first, second])
    expected = ahead.after(3, Position(0))
    now = live_settings(first), live_settings(second)
    for _ in range(3):
        for o, s in zip((second, first), schedulers, strict=True):
            train(o)
            s.step()
    assert expected is not None
    assert predicted(expected[0], now[0]) == live_settings(first)
    assert predicted(expected[1], now[1]) == live_settings(second)


def test_hand_set_learning_rate_is_noticed() -> None:
    optimizer = two_groups(OPTIMIZERS["sgd"])
    ahead = SettingsAhead([torch_schedulers.ExponentialLR(optimizer, 0.5)], [optimizer])
    assert ahead.after(1, Position(0))[0][0]["lr"] == 0.05  # type: ignore[index]
    optimizer.param_groups[0]["lr"] = 8.0
    assert ahead.after(1, Position(0))[0][0]["lr"] == 4.0  # type: ignore[index]
    optimizer.param_groups[0]["lr"] = 2.0
    assert ahead.rates(2, Position(0)) == [1.0, 0.5]


def test_resumed_scheduler_is_noticed_at_the_same_learning_rate() -> None:
    optimizer = two_groups(OPTIMIZERS["sgd"])
    scheduler = torch_schedulers.StepLR(optimizer, 10, 0.5)
    ahead = SettingsAhead([scheduler], [optimizer])
    assert ahead.after(1, Position(0))[0][0]["lr"] == 0.1  # type: ignore[index]
    scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": 9, "_step_count": 10})
    assert ahead.after(1, Position(0))[0][0]["lr"] == 0.05  # type: ignore[index]


def test_replaced_scheduler_is_noticed() -> None:
    optimizer = two_groups(OPTIMIZERS["sgd"])
    live: list[LRScheduler] = [torch_schedulers.StepLR(optimizer, 1, 0.5)]
    ahead = SettingsAhead(live, [optimizer])
    assert ahead.after(1, Position(0))[0][0]["lr"] == 0.05  # type: ignore[index]
    live[0] = torch_schedulers.StepLR(optimizer, 1, 0.1)
    assert ahead.after(1, Position(0))[0][0]["lr"] == pytest.approx(0.01)  # type: ignore[index]


def test_no_answer_beyond_the_end_of_one_cycle() -> None:
    optimizer = two_groups(OPTIMIZERS["sgd"])
    ahead = SettingsAhead([one_cycle(optimizer)], [optimizer])
    assert ahead.after(STEPS, Position(0)) is not None  # torch allows one step past the last
    assert ahead.after(STEPS + 1, Position(0)) is None
    assert len(ahead.rates(STEPS + 3, Position(0))) == STEPS
    assert "number of total steps" in str(ahead.why_not)
    assert ahead.after(1, Position(0)) is not None


def test_metric_driven_scheduler_has_no_future() -> None:
    optimizer = two_groups(OPTIMIZERS["sgd"])
    ahead = SettingsAhead([torch_schedulers.ReduceLROnPlateau(optimizer)], [optimizer])
    assert ahead.after(1, Position(0)) is None
    assert "waits for a metric" in str(ahead.why_not)


def test_epoch_of_unknown_length_has_no_future() -> None:
    optimizer = two_groups(OPTIMIZERS["sgd"])
    ahead = SettingsAhead([Scheduled(torch_schedulers.StepLR(optimizer, 1), interval="epoch")], [optimizer])
    assert ahead.after(1, Position(0)) is None
    assert "not known" in str(ahead.why_not)


def test_schedule_that_raises_gives_no_answer() -> None:
    def factor(step: int) -> float:
        return [1.0, 0.5][step]

    optimizer = two_groups(OPTIMIZERS["sgd"])
    ahead = SettingsAhead([torch_schedulers.LambdaLR(optimizer, factor)], [optimizer])
    assert ahead.after(2, Position(0)) is None
    assert "list index out of range" in str(ahead.why_not)


def test_negative_steps_are_refused() -> None:
    optimizer = two_groups(OPTIMIZERS["sgd"])
    with pytest.raises(ValueError, match="Expected `n` >= 0"):
        SettingsAhead([], [optimizer]).after(-1, Position(0))


# ---------------------------------------------------------------------- a Trainer's timetable


class Scheduled4(LightningModule):
    """Four schedules at once, each on a group of its own, so that each one's timetable shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return sum(layer(batch).square().mean() for layer in self.layers)

    def configure_optimizers(self) -> Any:
        optimizer = SGD([{"params": layer.parameters()} for layer in self.layers], lr=1e-3)

        def only(index: int) -> LRScheduler:
            keep, halve = (lambda _: 1.0), (lambda _: 0.5)
            return torch_schedulers.MultiplicativeLR(optimizer, [halve if i == index else keep for i in range(4)])

        timetables = [("step", 1), ("step", 2), ("epoch", 1), ("epoch", 2)]
        return [optimizer], [
            {"scheduler": only(i), "interval": interval, "frequency": frequency}
            for i, (interval, frequency) in enumerate(timetables)
        ]


class Watch(Callback):
    def __init__(self) -> None:
        self.used: list[list[float]] = []
        self.foreseen: list[list[list[float]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.ahead = SettingsAhead(trainer.lr_scheduler_configs, trainer.optimizers)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        position = Position(
            batch=trainer.fit_loop.epoch_loop.batch_idx,
            epoch=trainer.current_epoch,
            batches=trainer.num_training_batches,
            accumulate=trainer.accumulate_grad_batches,
        )
        self.used.append([group["lr"] for group in optimizer.param_groups])
        settings = [self.ahead.after(n, position) for n in (1, 5)]
        self.foreseen.append([[group["lr"] for group in ahead[0]] for ahead in settings])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_settings_foreseen_in_a_trainer_are_used(accumulate: int) -> None:
    watch = Watch()
    trainer = Trainer(
        max_epochs=5,
        accumulate_grad_batches=accumulate,
        callbacks=[watch],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Scheduled4(), torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=1))
    assert len(watch.used) == 5 * math.ceil(8 / accumulate)
    for step, (one, five) in enumerate(watch.foreseen):
        assert watch.used[step + 1 : step + 2] in ([one], [])
        assert watch.used[step + 5 : step + 6] in ([five], [])
    assert all(len({row[i] for row in watch.used}) > 1 for i in range(4))  # each schedule did move


# ---------------------------------------------------------------------- the edge ratio there


class Quadratic(nn.Module):
    """½ xᵀ H x with x in two parameters."""

    def __init__(self, n: int = 6) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
        values = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
        self.hessian = basis @ torch.diag(values) @ basis.T
        self.x, self.y = (nn.Parameter(torch.randn(n // 2, generator=g, dtype=torch.float64)) for _ in range(2))

    def forward(self, _: Any = None) -> Tensor:
        x = torch.cat([self.x, self.y])
        return 0.5 * x @ self.hessian @ x


def loss_of(module: Any, batch: Any) -> Tensor:
    return module()


ONE = [torch.zeros(1)]


def measured(module: nn.Module, optimizer: Optimizer) -> Measurement:
    return Gauge(Solver(rtol=1e-8)).measure(module, loss_of, ONE, [optimizer], step=0, full_batch=True)


def ratio(module: nn.Module, optimizer: Optimizer) -> float:
    value = measure_stability(module, loss_of, ONE, optimizer, rtol=1e-8).edge_ratio
    assert value is not None
    return value


def step_on(module: Quadratic, optimizer: Optimizer, scheduler: LRScheduler, *, frozen: bool = False) -> None:
    optimizer.zero_grad()
    module().backward()
    moments = {p: state["exp_avg_sq"].clone() for p, state in optimizer.state.items()} if frozen else {}
    optimizer.step()
    for p, moment in moments.items():
        optimizer.state[p]["exp_avg_sq"].copy_(moment)
    scheduler.step()


SGD_FAMILY: dict[str, dict[str, Any]] = {
    "sgd": {},
    "heavy-ball": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "heavy-ball-decay": {"momentum": 0.9, "weight_decay": 0.1},
}


@pytest.mark.parametrize("max_lr", [0.02, [0.02, 0.005]], ids=["one-lr", "two-lrs"])
@pytest.mark.parametrize("name", SGD_FAMILY)
def test_next_ratio_is_what_is_measured_one_step_later(name: str, max_lr: Any) -> None:
    module = Quadratic()
    optimizer = SGD([{"params": [module.x]}, {"params": [module.y]}], lr=0.1, **SGD_FAMILY[name])
    scheduler = torch_schedulers.OneCycleLR(optimizer, max_lr, total_steps=24, cycle_momentum=name != "sgd")
    ahead = SettingsAhead([scheduler], [optimizer])
    moved = []
    for step in range(20):
        now = measured(module, optimizer)
        foreseen = edge_ratio_at(now, [optimizer], ahead.after(1, Position(step)))
        step_on(module, optimizer, scheduler)
        later = ratio(module, optimizer)
        # The Hessian is the same: what is left is the eigen-solver's stop, 1e-8.
        assert foreseen == pytest.approx(later, rel=1e-6)
        moved.append(abs(later / now.reading.edge_ratio - 1))
    assert max(moved) > 0.1


@pytest.mark.parametrize(
    ("cls", "decay", "max_lr"),
    # Decoupled decay bends C where groups differ in lr, so that there is no exact factor.
    [(Adam, 0.0, [2.0, 0.5]), (Adam, 0.1, [2.0, 0.5]), (AdamW, 0.0, [2.0, 0.5]), (AdamW, 0.1, 2.0)],
)
def test_next_ratio_of_adam_with_moving_betas(cls: Any, decay: float, max_lr: Any) -> None:
    module = Quadratic()
    optimizer = cls(
        [{"params": [module.x]}, {"params": [module.y]}], lr=0.1, betas=(0.9, 0.99), eps=1e-12, weight_decay=decay
    )
    scheduler = torch_schedulers.OneCycleLR(optimizer, max_lr, total_steps=60, base_momentum=0.8)
    ahead = SettingsAhead([scheduler], [optimizer])
    for _ in range(34):  # until the state is old enough
        step_on(module, optimizer, scheduler)
    for step in range(34, 50):
        foreseen = edge_ratio_at(measured(module, optimizer), [optimizer], ahead.after(1, Position(step)))
        step_on(module, optimizer, scheduler, frozen=True)
        # eps bends C by 1e-12 of itself; t moves on by one step.
        assert foreseen == pytest.approx(ratio(module, optimizer), rel=1e-6)


def test_scheduled_jump_raises_the_next_ratio_before_the_jump() -> None:
    module = Quadratic()
    optimizer = SGD(module.parameters(), lr=0.01)
    scheduler = torch_schedulers.MultiStepLR(optimizer, [3], gamma=5.0)
    ahead = SettingsAhead([scheduler], [optimizer])
    factors = []
    for step in range(4):
        now = measured(module, optimizer)
        foreseen = edge_ratio_at(now, [optimizer], ahead.after(1, Position(step)))
        factors.append(foreseen / now.reading.edge_ratio)
        step_on(module, optimizer, scheduler)
    assert factors == pytest.approx([1.0, 1.0, 5.0, 1.0])


def unequal() -> tuple[Quadratic, Optimizer, LRScheduler]:
    module = Quadratic()
    optimizer = SGD([{"params": [module.x]}, {"params": [module.y]}], lr=0.01)
    return module, optimizer, torch_schedulers.LambdaLR(optimizer, [lambda s: 1.0 + s, lambda s: 1.0])


def test_groups_that_part_have_no_next_ratio_without_a_solver() -> None:
    module, optimizer, scheduler = unequal()
    settings = SettingsAhead([scheduler], [optimizer]).after(1, Position(0))
    assert edge_ratio_at(measured(module, optimizer), [optimizer], settings) is None


def test_groups_that_part_are_solved_for_where_there_is_a_solver() -> None:
    module, optimizer, scheduler = unequal()

    def solve(there: CriticalCurvature) -> tuple[float, Tensor]:
        assert there.c is not None
        scale = there.c.rsqrt()
        values, vectors = torch.linalg.eigh(scale[:, None] * module.hessian * scale)
        return float(values[-1]), scale * vectors[:, -1]

    settings = SettingsAhead([scheduler], [optimizer]).after(1, Position(0))
    foreseen = edge_ratio_at(measured(module, optimizer), [optimizer], settings, solve)
    step_on(module, optimizer, scheduler)
    assert foreseen == pytest.approx(ratio(module, optimizer), rel=1e-6)


def test_small_bend_is_followed_along_the_mode() -> None:
    module = Quadratic()
    optimizer = SGD([{"params": [module.x]}, {"params": [module.y]}], lr=0.01)
    scheduler = torch_schedulers.LambdaLR(optimizer, [lambda s: 1.0 + 0.009 * s, lambda s: 1.0])
    settings = SettingsAhead([scheduler], [optimizer]).after(1, Position(0))
    foreseen = edge_ratio_at(measured(module, optimizer), [optimizer], settings)
    step_on(module, optimizer, scheduler)
    # Second order in the bend of 9e-3, over a gap of (9 − 4)/9.
    assert foreseen == pytest.approx(ratio(module, optimizer), rel=2e-4)


def test_schedule_that_ends_at_zero_ends_at_ratio_zero() -> None:
    module = Quadratic()
    optimizer = SGD(module.parameters(), lr=0.01)
    scheduler = torch_schedulers.LambdaLR(optimizer, lambda s: 1.0 - s)
    settings = SettingsAhead([scheduler], [optimizer]).after(1, Position(0))
    assert edge_ratio_at(measured(module, optimizer), [optimizer], settings) == 0.0


def test_no_settings_no_ratio() -> None:
    module = Quadratic()
    optimizer = SGD(module.parameters(), lr=0.01)
    assert edge_ratio_at(measured(module, optimizer), [optimizer], None) is None
