"""Objects of the user's own that hang on a module: what they hold of the run is isolated, and differentiated."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from eos_monitor import measure_stability
from eos_monitor.isolation.sandbox import Sandbox

STRENGTH = 50.0


def penalty(params: Any, strength: float = STRENGTH) -> Tensor:
    return strength * sum(p.square().sum() for p in params)


class Regularizer:
    def __init__(self, params: Any) -> None:
        self.params = params

    def __call__(self) -> Tensor:
        return penalty(self.params)


class Slotted:
    __slots__ = ("params",)

    def __init__(self, params: Any) -> None:
        self.params = params

    def __call__(self) -> Tensor:
        return penalty(self.params)


class Outer:
    """Holds what holds them, and itself."""

    def __init__(self, params: Any) -> None:
        self.inner = {"of": [Regularizer(params)]}
        self.me = self

    def __call__(self) -> Tensor:
        return self.me.inner["of"][0]()


def closing_over(params: Any) -> Callable[[], Tensor]:
    return lambda: penalty(params)


HOLDERS: dict[str, Callable[[list[Tensor]], Callable[[], Tensor]]] = {
    "object": Regularizer,
    "slots": Slotted,
    "nested": Outer,
    "partial": lambda params: functools.partial(penalty, params),
    "keyword-partial": lambda params: functools.partial(penalty, params=params),
    "method": lambda params: Regularizer(params).__call__,
    "closure": closing_over,
    "closure-over-object": lambda params: closing_over(Regularizer(params).params),
    "default": lambda params: lambda held=params: penalty(held),  # type: ignore[misc]
    "keyword-default": lambda params: lambda *, held=params: penalty(held),  # type: ignore[misc]
}


@pytest.mark.parametrize("where", ["module", "sub-module", "loss"])
@pytest.mark.parametrize("name", HOLDERS)
def test_the_curvature_of_parameters_that_something_holds_is_seen(name: str, where: str) -> None:
    """Mean square of a linear net: λ_max(2/N XᵀX) + 2·50, by hand."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 1))
    x = torch.randn(32, 3)
    held = HOLDERS[name](list(net.parameters()))
    owner = {"module": net, "sub-module": net[0]}.get(where)
    if owner is not None:
        owner.penalty = held

    def loss_fn(module: Any, batch: Tensor) -> Tensor:
        owners = {"module": module, "sub-module": module[0]}
        penalized = held if where == "loss" else owners[where].penalty
        return module(batch).square().mean() + penalized()

    reading = measure_stability(net, loss_fn, [x], SGD(net.parameters(), lr=1e-3))
    design = torch.cat([x, torch.ones(32, 1)], 1).double()
    expected = float(torch.linalg.eigvalsh(2 / 32 * design.T @ design)[-1]) + 2 * STRENGTH
    assert reading.sharpness == pytest.approx(expected, rel=1e-5)


def test_parameters_that_nothing_can_stand_in_for_are_refused() -> None:
    net = nn.Linear(3, 1)
    outside = {"params": net.parameters}

    class Far:
        """Gets at them on a way that no copy goes."""

        def __del__(self) -> None: ...

        def __init__(self) -> None:
            self.params = list(net.parameters())

    outside["far"] = Far()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"holds 2 of them itself \(.*curvature would be missing"):
        measure_stability(
            net,
            lambda m, x: m(x).square().mean() + penalty(outside["far"].params),  # type: ignore[attr-defined]
            [torch.randn(8, 3)],
            SGD(net.parameters(), lr=1e-3),
        )


class Meter:
    """Counts, as an AverageMeter does."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0
        self.history: list[float] = []

    def update(self, value: float, n: int) -> None:
        self.sum += value * n
        self.count += n
        self.history.append(value)


class Metered(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.meter.update(float(y.detach().mean()), len(x))
        return y


def test_a_counter_does_not_count_a_reading() -> None:
    net = Metered(3, 1)
    net.meter = Meter()
    meter = net.meter
    net(torch.ones(4, 3))
    before = (meter.sum, meter.count, list(meter.history))
    measure_stability(net, lambda m, x: m(x).square().mean(), [torch.ones(4, 3)], SGD(net.parameters(), lr=0.1))
    assert net.meter is meter
    assert (meter.sum, meter.count, meter.history) == before


def test_a_hook_that_fills_a_list_fills_the_one_that_the_loss_reads() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    features: list[Tensor] = []
    net[0].register_forward_hook(lambda module, inputs, output: features.append(output))

    def loss_fn(module: Any, x: Tensor) -> Tensor:
        return module(x).square().mean() + features[-1].square().mean()

    x = torch.randn(16, 3)
    reading = measure_stability(net, loss_fn, [x], SGD(net.parameters(), lr=0.1), full_batch=True)
    assert reading.converged


def test_a_hook_that_fills_an_object_fills_the_one_that_the_loss_reads() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    store = Regularizer([])
    net[0].register_forward_hook(lambda module, inputs, output: setattr(store, "params", [output]))
    x = torch.randn(16, 3)

    def loss_fn(module: Any, x: Tensor) -> Tensor:
        return module(x).square().mean() + store()

    def direct(module: Any, x: Tensor) -> Tensor:
        return module(x).square().mean() + penalty([module[0](x)])

    sgd = SGD(net.parameters(), lr=0.1)
    reading = measure_stability(net, loss_fn, [x], sgd, full_batch=True)
    expected = measure_stability(net, direct, [x], sgd, full_batch=True)
    assert reading.sharpness == pytest.approx(expected.sharpness, rel=1e-5)


def test_attributes_of_parameters_are_there_in_every_evaluation() -> None:
    net = nn.Linear(3, 1)
    net.weight.infshape = ("muP", 3)  # type: ignore[attr-defined]
    net.bias.requires_grad_(False)
    net.bias.scale = 2.0  # type: ignore[attr-defined]
    seen = []

    def loss_fn(module: Any, x: Tensor) -> Tensor:
        seen.append((module.weight.infshape, module.bias.scale))
        return module(x).square().mean()

    assert measure_stability(net, loss_fn, [torch.ones(4, 3)], SGD(net.parameters(), lr=0.1)).converged
    assert set(seen) == {(("muP", 3), 2.0)}


def test_values_behind_objects_are_cast_with_the_rest() -> None:
    net = nn.Linear(2, 1)
    net.constants = Regularizer([torch.ones(2)])
    with Sandbox(net) as sandbox:
        held = sandbox.evaluate(lambda m, _: m.constants.params[0], None, {}, dtype=torch.float64)
    assert held.dtype == torch.float64
    assert net.constants.params[0].dtype == torch.float32
