"""A list that a run appends to at each step costs a reading nothing, and is what it was afterwards."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from eos_monitor import HessianOperator, measure_stability
from eos_monitor.isolation.sandbox import Sandbox
from tests.operators import Counted


class Recorder(nn.Module):
    def __init__(self, entries: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.outputs = [torch.tensor(float(i)) for i in range(entries)]
        self.by_name = {"losses": [torch.tensor(float(i)) for i in range(entries)]}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator)


def appending(net: Any, batch: Any) -> Tensor:
    loss = (net.net(batch[0]) - batch[1]).square().mean()
    net.outputs.append(loss)
    net.by_name["losses"].append(loss.detach())
    net.last = len(net.outputs)
    return loss


def operators(entries: int) -> int:
    net = Recorder(entries)
    with Counted() as counted:
        measure_stability(net, appending, [batch()], SGD(net.parameters(), lr=0.1), full_batch=True)
    return counted.count


def test_operators_of_a_reading_do_not_grow_with_what_the_loss_appends_to() -> None:
    assert operators(500) == operators(100)


ACCESSES: dict[str, Callable[[list[Any]], Any]] = {
    "index": lambda held: held[0].add_(1),
    "last": lambda held: held[-1].add_(1),
    "slice": lambda held: held[2:4][0].add_(1),
    "loop": lambda held: [x.mul_(2) for x in held],
    "reversed": lambda held: next(reversed(held)).add_(1),
    "foreach": lambda held: torch._foreach_add_(held, 1.0),
    "out": lambda held: torch._foreach_zero_(held),
    "pop": lambda held: held.pop().add_(1),
    "added to": lambda held: ([] + held)[0].add_(1),
    "adds": lambda held: (held + [])[0].add_(1),
    "times": lambda held: (held * 1)[0].add_(1),
    "unpacked": lambda held: [*held][0].add_(1),
    "called with": lambda held: (lambda *found: found[0].add_(1))(*held),
    "extends": lambda held: _extended(held)[0].add_(1),
    "sliced into": lambda held: _sliced(held)[0].add_(1),
    "copied": lambda held: held.copy()[0].add_(1),
    "shallow": lambda held: copy.copy(held)[0].add_(1),
    "sorted": lambda held: sorted(held, key=float)[0].add_(1),
    "zipped": lambda held: next(zip(held, held, strict=True))[0].add_(1),
    "tuple": lambda held: tuple(held)[0].add_(1),
    "cleared": lambda held: held.clear(),
    "removed": lambda held: held.__delitem__(slice(3)),
    "set": lambda held: held.__setitem__(0, None),
    "inserted": lambda held: held.insert(0, None),
    "reversed in place": lambda held: held.reverse(),
    "sorted in place": lambda held: held.sort(key=lambda x: -float(x)),
}


def _extended(held: list[Any]) -> list[Any]:
    found: list[Any] = []
    found.extend(held)
    return found


def _sliced(held: list[Any]) -> list[Any]:
    found: list[Any] = [None]
    found[:] = held
    return found


@pytest.mark.parametrize("name", ACCESSES)
def test_no_access_reaches_the_list_of_the_run(name: str) -> None:
    """And each evaluation starts from it: an addition that lasted would show in the second."""
    net = Recorder(100)
    held = net.outputs
    entries = list(held)
    values = [float(x) for x in held]
    found = []

    def loss_fn(module: Any, batch: Any) -> Tensor:
        ACCESSES[name](module.outputs)
        found.append(sum(float(x) for x in module.outputs if x is not None))
        module.outputs.append(torch.zeros(()))
        return (module.net(batch[0]) - batch[1]).square().mean()

    operator = HessianOperator(net, loss_fn, [batch()])
    operator.evaluate()
    operator.matvec(torch.ones(operator.size))
    assert net.outputs is held
    assert len(held) == len(entries)
    assert all(a is b for a, b in zip(held, entries, strict=True))
    assert [float(x) for x in held] == values
    assert found[0] == found[1]


@pytest.mark.parametrize("entries", [10, 100])
def test_what_a_loss_reads_of_a_list_is_what_it_appended_and_what_was_there(entries: int) -> None:
    """As a plain list of the same numbers has it, with the gradient of what was appended."""
    net = Recorder(entries)
    seen: dict[str, Any] = {}

    def loss_fn(module: Any, batch: Any) -> Tensor:
        module.outputs.append((module.net(batch[0]) - batch[1]).square().mean())
        held = module.outputs
        assert isinstance(held, list)
        seen.update(
            length=len(held),
            first=float(held[0]),
            there=any(x is held[-1] for x in held),
            pickled=[float(x) for x in pickle.loads(pickle.dumps([x.detach() for x in held]))],
            deep=[float(x) for x in copy.deepcopy([x.detach() for x in held])],
        )
        return torch.stack(module.outputs).mean()

    x, y = batch()
    with Sandbox(net) as sandbox:
        value = sandbox.evaluate(loss_fn, (x, y), {})
    own = float((net.net(x) - y).square().mean().detach())
    assert float(value) == pytest.approx((sum(range(entries)) + own) / (entries + 1))
    assert seen["length"] == entries + 1
    assert seen["first"] == 0.0
    assert seen["there"]
    assert seen["pickled"] == seen["deep"] == pytest.approx([*range(entries), own])


def test_entries_are_cast_with_everything_else() -> None:
    net = Recorder(100)
    kinds = []

    def loss_fn(module: Any, batch: Any) -> Tensor:
        kinds.append(torch.stack(module.outputs).dtype)
        kinds.append(module.by_name["losses"][5].dtype)
        return (module.net(batch[0]) - batch[1]).square().mean()

    with Sandbox(net) as sandbox:
        stand_ins = {p: p.detach().double() for p in net.parameters()}
        sandbox.evaluate(loss_fn, batch(), stand_ins, dtype=torch.float64)
    assert set(kinds) == {torch.float64}
    assert net.outputs[0].dtype == torch.float32


def test_a_long_list_of_parameters_holds_their_stand_ins() -> None:
    net = Recorder(0)
    net.held = [nn.Parameter(torch.ones(())) for _ in range(100)]
    for i, p in enumerate(net.held):
        net.register_parameter(f"p{i}", p)

    def loss_fn(module: Any, batch: Any) -> Tensor:
        return torch.stack(module.held).square().sum() + module.net(batch[0]).square().mean()

    operator = HessianOperator(net, loss_fn, [batch()])
    v = torch.zeros(operator.size)
    v[0] = 1.0  # parameters of the module itself come first
    assert torch.equal(operator.matvec(v), 2 * v)  # ∂² Σ p²


def test_a_backward_that_recomputes_finds_the_entries() -> None:
    net = Recorder(100)

    def block(x: Tensor, held: list[Tensor]) -> Tensor:
        return torch.tanh(x) * held[1]

    def loss_fn(module: Any, batch: Any) -> Tensor:
        hidden = module.net(batch[0])
        return torch.utils.checkpoint.checkpoint(block, hidden, module.outputs, use_reentrant=False).square().mean()

    def plain(module: Any, batch: Any) -> Tensor:
        return block(module.net(batch[0]), [torch.tensor(0.0), torch.tensor(1.0)]).square().mean()

    operator = HessianOperator(net, loss_fn, [batch()])
    v = torch.ones(operator.size)
    assert torch.allclose(operator.matvec(v), HessianOperator(net, plain, [batch()]).matvec(v))
    assert [float(x) for x in net.outputs] == [float(i) for i in range(100)]
