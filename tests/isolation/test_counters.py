"""Counters, meters and buffers in objects of the user's own are copied for an evaluation, as a module's attributes."""

import functools
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eos_monitor.isolation.sandbox import Sandbox

T = TypeVar("T")


class Meter:
    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0

    def update(self, value: float, n: int) -> None:
        self.sum += value * n
        self.count += n


class Locked(Meter):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()  # cannot be copied by copy.deepcopy


class Slotted:
    __slots__ = ("_seen", "average")

    def __init__(self) -> None:
        self._seen = 0
        self.average = torch.zeros(3)

    def update(self, value: float, n: int) -> None:
        self._seen += n
        self.average.add_(value)


@dataclass
class Record(Generic[T]):
    values: list[T] = field(default_factory=list)
    array: Any = field(default_factory=lambda: np.zeros(2))

    def update(self, value: Any, n: int) -> None:
        self.values.append(value)
        self.array[0] += n


class History(dict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("a copy runs no code of the class")

    def update(self, value: float, n: int) -> None:  # type: ignore[override]
        dict.__setitem__(self, "count", dict.get(self, "count", 0) + n)


class Log(list):  # type: ignore[type-arg]
    def update(self, value: float, n: int) -> None:
        self.append((value, n))


class Nested:
    def __init__(self) -> None:
        self.meters = {"loss": Meter(), "all": [Meter()]}
        self.me = self

    def update(self, value: float, n: int) -> None:
        self.meters["loss"].update(value, n)  # type: ignore[attr-defined]
        self.meters["all"][0].update(value, n)  # type: ignore[index]
        assert self.me is self


def namespace() -> Any:
    return types.SimpleNamespace(count=0)


def count_up(held: Any, value: float, n: int) -> None:
    held.count += n


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any, float, int], Any]]] = {
    "meter": (Meter, Meter.update),
    "with-a-lock": (Locked, Meter.update),
    "slots": (Slotted, Slotted.update),
    "dataclass": (Record, Record.update),
    "dictionary-of-its-own": (History, History.update),
    "list-of-its-own": (Log, Log.update),
    "nested-and-cyclic": (Nested, Nested.update),
    "namespace": (namespace, count_up),
    "bound-method": (lambda: Meter().update, lambda held, value, n: held(value, n)),
    "partial": (lambda: functools.partial(count_up, Meter()), lambda held, value, n: held(value, n)),
}


def state(value: Any) -> Any:
    """Everything of an object that these classes have, as text."""
    if isinstance(value, types.MethodType):
        return state(value.__self__)
    if isinstance(value, functools.partial):
        return state(value.args[0])
    if isinstance(value, Slotted):
        return value._seen, value.average.tolist()
    if isinstance(value, Nested):
        return state(value.meters["loss"]), state(value.meters["all"][0])  # type: ignore[index]
    held = {key: str(item) for key, item in vars(value).items()} if hasattr(value, "__dict__") else {}
    return held, str(list(value)) if isinstance(value, list) else str(value) if isinstance(value, dict) else ""


class Net(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.held = held
        self.again = [held]


@pytest.mark.parametrize("kind", KINDS)
def test_a_counter_stays_as_it_is_and_every_evaluation_starts_from_it(kind: str) -> None:
    make, update = KINDS[kind]
    net = Net(make())
    update(net.held, 1.0, 2)
    before = state(net.held)
    held = net.held
    seen: list[Any] = []

    def loss(module: Any, batch: Tensor) -> Tensor:
        value = module.linear(batch).square().mean()
        assert type(module.held) is type(held)
        assert state(module.held) == before
        update(module.held, float(value.detach()), len(batch))
        assert state(module.again[0]) == state(module.held) != before  # one object stays one
        seen.append(state(module.held))
        return value

    with Sandbox(net) as sandbox:
        for _ in range(3):
            sandbox.evaluate(loss, torch.ones(4, 3), {})
    assert net.held is held
    assert state(net.held) == before
    assert seen[0] == seen[1] == seen[2]


def test_a_regularizer_gets_the_stand_ins_of_the_parameters_that_it_holds() -> None:
    class Decay:
        def __init__(self, params: list[Tensor]) -> None:
            self.params = params

        def __call__(self) -> Tensor:
            return sum((p.square().sum() for p in self.params), torch.zeros(()))

    net = Net(None)
    net.held = Decay(list(net.parameters()))
    stand_ins = {p: p.detach().clone().requires_grad_() for p in net.parameters()}
    with Sandbox(net) as sandbox:
        value = sandbox.evaluate(lambda module, batch: module.held(), torch.ones(1), stand_ins)
        gradients = torch.autograd.grad(value, list(stand_ins.values()))
    for p, gradient in zip(stand_ins, gradients, strict=True):
        torch.testing.assert_close(gradient, 2 * p.detach())  # of Σ p²


class Closing(Meter):
    closed = 0

    def __del__(self) -> None:
        type(self).closed += 1


class Large:
    def __init__(self) -> None:
        self.items = list(range(100_000))


class Own(Meter):
    def __copy__(self) -> "Own":
        return self


@pytest.mark.parametrize("kind", [Closing, Large, Own, torch.utils.data.Dataset])
def test_what_is_more_than_its_attributes_is_shared(kind: Any) -> None:
    Closing.closed = 0
    held = kind()
    net = Net(held)
    found: list[Any] = []

    def loss(module: Any, batch: Tensor) -> Tensor:
        found.append(module.held is held)
        return module.linear(batch).sum()  # type: ignore[no-any-return]

    with Sandbox(net) as sandbox:
        sandbox.evaluate(loss, torch.ones(4, 3), {})
    assert found == [True]
    assert Closing.closed == 0
