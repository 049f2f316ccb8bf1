"""What Fabric, Accelerate and others wrap is read as what is inside: against the dense Hessian of the bare net."""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from eos_monitor import Probe, StabilityProbe, critical_curvature, estimate_cfl, measure_stability, preflight
from eos_monitor.forecast.lookahead import Position, SettingsAhead
from eos_monitor.isolation.twin import as_list

LR = 0.1


def make_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return x, x[:, :1] ** 2


def loss_fn(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


def largest_eigenvalue(net: nn.Module) -> float:
    """Of the dense Hessian in double precision, the net written out."""
    x, y = (t.double() for t in data())
    trained = [p.detach().double() for p in net.parameters()]

    def loss(flat: Tensor) -> Tensor:
        w1, b1, w2, b2 = (
            part.view(p.shape) for part, p in zip(torch.split(flat, [p.numel() for p in trained]), trained, strict=True)
        )
        return F.mse_loss((x @ w1.T + b1).tanh() @ w2.T + b2, y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in trained]))
    return float(torch.linalg.eigvalsh(hessian)[-1])


# ---------------------------------------------------------------- Fabric


def fabric_of(precision: str) -> Any:
    fabric = pytest.importorskip("lightning.fabric")
    return fabric.Fabric(accelerator="cpu", devices=1, precision=precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true", "bf16-true"])
def test_fabric_is_read_as_what_it_wraps(precision: str) -> None:
    fabric = fabric_of(precision)
    net = make_net()
    sgd = SGD(net.parameters(), lr=LR, momentum=0.9)
    module, optimizer = fabric.setup(net, sgd)
    reading = measure_stability(module, loss_fn, [data()], optimizer, rtol=1e-4)
    assert type(optimizer).__name__ == "FabricSGD"
    # The edge of the heavy ball is 2 (1 + γ) / lr.
    expected = largest_eigenvalue(net) / (2 * 1.9 / LR)
    # bf16 parameters: products in 8 bits of mantissa, some of them with the same sign
    assert reading.edge_ratio == pytest.approx(expected, rel=0.03 if precision == "bf16-true" else 1e-4)
    assert module.training
    assert "forward" not in vars(module)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_everything_public_takes_what_fabric_wraps(precision: str) -> None:
    fabric = fabric_of(precision)
    net = make_net()
    bare = AdamW(net.parameters(), lr=1e-3)
    module, optimizer = fabric.setup(net, bare)
    for _ in range(40):
        optimizer.zero_grad()
        fabric.backward(loss_fn(module, data()))
        optimizer.step()
    wrapped, inside = critical_curvature(optimizer), critical_curvature(bare)
    assert wrapped.c is not None
    assert inside.c is not None
    assert torch.equal(wrapped.c, inside.c)
    ratios = [measure_stability(a, loss_fn, [data()], b).edge_ratio for a, b in ((module, optimizer), (net, bare))]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)
    flights = [preflight(a, loss_fn, [data()], b, steps=3) for a, b in ((module, optimizer), (net, bare))]
    assert flights[0].edge_ratio == pytest.approx(flights[1].edge_ratio, rel=1e-6)
    layers = [
        [e.cfl_number for e in estimate_cfl(a, loss_fn, [data()], b)] for a, b in ((module, optimizer), (net, bare))
    ]
    assert layers[0] == pytest.approx(layers[1], rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_loop_of_fabric_is_watched(precision: str) -> None:
    fabric = fabric_of(precision)
    net = make_net()
    module, optimizer = fabric.setup(net, SGD(net.parameters(), lr=LR))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)  # of the wrapper
    probe = StabilityProbe(
        module, optimizer, loss_fn, every_n_steps=1, probe=Probe(full_batch=True), schedulers=[scheduler], alerts=()
    )
    for step in range(4):
        expected = largest_eigenvalue(net) * LR * 0.5 ** (step // 2) / 2
        reading = probe.step(data())
        assert reading is not None
        assert reading.edge_ratio == pytest.approx(expected, rel=1e-2)  # what was asked for
        ahead = 0.5 if step % 2 else 1.0
        assert reading.edge_ratio_next == pytest.approx(ahead * reading.edge_ratio, rel=1e-6)
        optimizer.zero_grad()
        fabric.backward(loss_fn(module, data()))
        optimizer.step()
        scheduler.step()
    assert probe.off == {}


# ---------------------------------------------------------------- Accelerate


class AcceleratedOptimizer(Optimizer):
    """As accelerate.optimizer.AcceleratedOptimizer keeps what it wraps."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.scaler = None
        self.device_placement = True
        self._is_overflow = False
        self._accelerate_step_called = False

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class AcceleratedScheduler:
    """As accelerate.scheduler.AcceleratedScheduler keeps what it wraps."""

    def __init__(self, scheduler: Any, optimizers: Any) -> None:
        self.scheduler = scheduler
        self.optimizers = optimizers
        self.split_batches = False
        self.step_with_optimizer = True

    def step(self, *args: Any, **kwargs: Any) -> None:
        self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> Any:
        return self.scheduler.get_last_lr()


def with_autocast(net: nn.Module) -> nn.Module:
    """As Accelerator.prepare_model changes a module for bf16."""
    original = net.forward
    net._original_forward = original  # type: ignore[assignment]

    @functools.wraps(original.__func__)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return original.__func__(self, *args).float()  # type: ignore[attr-defined, no-any-return]

    net.forward = MethodType(forward, net)  # type: ignore[method-assign]
    return net


def prepared_by_hand(net: nn.Module, optimizer: Optimizer, scheduler: Any) -> tuple[Any, Any, Any]:
    wrapped = AcceleratedOptimizer(optimizer)
    return with_autocast(net), wrapped, AcceleratedScheduler(scheduler, [wrapped])


def prepared_by_accelerate(net: nn.Module, optimizer: Optimizer, scheduler: Any) -> tuple[Any, Any, Any]:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(net, optimizer, scheduler)  # type: ignore[no-any-return]


@pytest.mark.parametrize("prepare", [prepared_by_hand, prepared_by_accelerate])
def test_a_loop_of_accelerate_is_watched(prepare: Callable[..., Any]) -> None:
    bare = make_net()
    sgd = SGD(bare.parameters(), lr=LR)
    net, optimizer, scheduler = prepare(bare, sgd, torch.optim.lr_scheduler.StepLR(sgd, 2, 0.5))
    probe = StabilityProbe(
        net, optimizer, loss_fn, every_n_steps=1, probe=Probe(full_batch=True), schedulers=[scheduler], alerts=()
    )
    for step in range(4):
        # The loss of the net without bf16, to what was asked for.
        expected = largest_eigenvalue(bare) * LR * 0.5 ** (step // 2) / 2
        reading = probe.step(data())
        assert reading is not None
        assert reading.edge_ratio == pytest.approx(expected, rel=1e-2)
        ahead = 0.5 if step % 2 else 1.0
        assert reading.edge_ratio_next == pytest.approx(ahead * reading.edge_ratio, rel=1e-6)
        optimizer.zero_grad()
        loss_fn(net, data()).backward()
        optimizer.step()
        scheduler.step()
    assert probe.off == {}
    assert vars(net)["forward"] is not vars(net)["_original_forward"]


def entry_of(kind: str, optimizer: Optimizer) -> Any:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return {
        "bare": scheduler,
        "accelerate": AcceleratedScheduler(scheduler, [optimizer]),
        "twice": AcceleratedScheduler(AcceleratedScheduler(scheduler, []), []),
        "dictionary": {"scheduler": scheduler, "interval": "step"},
        "of-the-wrapper": AcceleratedScheduler(
            torch.optim.lr_scheduler.StepLR(AcceleratedOptimizer(optimizer), 2, 0.5), []
        ),
    }[kind]


@pytest.mark.parametrize("kind", ["bare", "accelerate", "twice", "dictionary", "of-the-wrapper"])
def test_wrapped_schedulers_are_foreseen_and_left_alone(kind: str) -> None:
    net = make_net()
    sgd = SGD(net.parameters(), lr=LR)
    entry = entry_of(kind, sgd)
    ahead = SettingsAhead([entry], [AcceleratedOptimizer(sgd)])
    assert ahead.rates(5, Position(0)) == pytest.approx([LR, LR / 2, LR / 2, LR / 4, LR / 4])
    assert sgd.param_groups[0]["lr"] == LR
    result = preflight(net, loss_fn, [data()], sgd, steps=2, schedulers=[entry])
    assert [reading.lr[0] for reading in result.readings] == pytest.approx([LR, LR, LR / 2])


# ---------------------------------------------------------------- schedule-free


class SGDScheduleFree(SGD):
    """Refuses to step in eval mode, as schedulefree's optimizers do; named so, it is recognized."""

    __module__ = "schedulefree.sgd_schedulefree"

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = False

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.param_groups[0]["train_mode"]:
            raise Exception("Optimizer was not in train mode when step is called.")
        super().step(closure)


def test_schedule_free_in_eval_mode_is_told_and_does_not_raise() -> None:
    net = make_net()
    optimizer = AcceleratedOptimizer(SGDScheduleFree(net.parameters(), lr=LR))
    reading = measure_stability(net, loss_fn, [data()], optimizer)
    assert reading.edge_ratio is None
    assert reading.directional_ratio is None
    assert any("SGDScheduleFree in eval mode" in note for note in reading.notes)
    result = preflight(net, loss_fn, [data()], optimizer, steps=2)
    assert result.losses[0] > result.losses[-1]
    assert optimizer.param_groups[0]["train_mode"] is False


# ---------------------------------------------------------------- who is not unwrapped


def test_only_wrappers_of_the_same_groups_are_passed_by() -> None:
    net = make_net()
    whole = SGD(net.parameters(), lr=LR)
    part = SGD(list(net.parameters())[:2], lr=LR)

    class Other(AcceleratedOptimizer):
        @property
        def param_groups(self) -> Any:  # type: ignore[override]
            return whole.param_groups

    assert as_list(AcceleratedOptimizer(whole)) == [whole]
    assert as_list(AcceleratedOptimizer(AcceleratedOptimizer(whole))) == [whole]
    other = Other(part)
    assert as_list(other) == [other]
