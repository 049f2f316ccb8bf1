"""What an evaluation sees of a module's attributes: copies of the same kind, of the same state, each made once."""

import functools
import random
from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eos_monitor.isolation.copies import Copies, cast
from eos_monitor.isolation.sandbox import Sandbox, check_loss, preserve_rng, random_states, seed_everything

Pair = namedtuple("Pair", ["a", "b"])


def seen(net: nn.Module, what: Any, **settings: Any) -> Any:
    """Return what an evaluation sees of a module."""
    with Sandbox(net) as sandbox:
        return sandbox.evaluate(lambda m, _: what(m), None, {}, **settings)


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", [True, False])
def test_tensors_that_want_a_gradient_go_on_wanting_one(wanted: bool, dtype: torch.dtype | None) -> None:
    """A learned prompt kept as a plain attribute, coordinates that a loss differentiates by."""
    net = nn.Linear(2, 2)
    net.prompt = torch.ones(2, requires_grad=wanted)
    net.more = {"inner": [torch.ones(2, requires_grad=wanted)]}
    net.computed = (3 * torch.ones(2, requires_grad=True)) if wanted else torch.ones(2)  # inside a graph
    tensors = seen(net, lambda m: [m.prompt, m.more["inner"][0], m.computed], dtype=dtype)
    for copied, live in zip(tensors, [net.prompt, net.more["inner"][0], net.computed], strict=True):
        assert copied is not live
        assert copied.requires_grad is wanted
        assert copied.is_leaf
        assert copied.dtype == (dtype or torch.float32)
        assert torch.equal(copied.detach().float(), live.detach())


def test_a_loss_can_differentiate_by_such_an_attribute() -> None:
    net = nn.Linear(1, 1, bias=False)
    net.points = torch.tensor([[2.0], [3.0]], requires_grad=True)

    def loss(module: Any, _: Any) -> Tensor:
        (slope,) = torch.autograd.grad(module(module.points).square().sum(), module.points, create_graph=True)
        return slope.sum().detach()

    with Sandbox(net) as sandbox:
        found = float(sandbox.evaluate(loss, None, {}))
    w = float(net.weight.detach())
    assert found == pytest.approx(2 * w * w * 5.0, rel=1e-6)  # Σ 2 w² x
    assert net.points.grad is None


VALUES: dict[str, Any] = {
    "list": [1, [2]],
    "tuple": (torch.ones(1), [1]),
    "namedtuple": Pair(torch.ones(1), [1]),
    "set": {1, 2},
    "bytearray": bytearray(b"ab"),
    "array": np.ones(2),
    "ordered": OrderedDict(a=[1]),
    "namespace": SimpleNamespace(a=[1]),
    "random": random.Random(1),
    "numpy-generator": np.random.default_rng(1),
    "numpy-random-state": np.random.RandomState(1),
    "torch-generator": torch.Generator().manual_seed(1),
}


@pytest.mark.parametrize("name", VALUES)
def test_copies_are_of_the_same_kind_and_of_their_own(name: str) -> None:
    value = VALUES[name]
    net = nn.Linear(1, 1)
    net.kept = value
    net.again = [value]
    copied, again = seen(net, lambda m: (m.kept, m.again[0]))
    assert type(copied) is type(value)
    assert copied is not value
    assert again is copied  # one object stays one object
    assert net.kept is value


@pytest.mark.parametrize("name", ["random", "numpy-generator", "numpy-random-state", "torch-generator"])
def test_a_copied_generator_draws_what_the_original_would(name: str) -> None:
    def draw(generator: Any) -> float:
        if isinstance(generator, torch.Generator):
            return float(torch.rand(1, generator=generator))
        return float(generator.random() if hasattr(generator, "random") else generator.rand())

    net = nn.Linear(1, 1)
    net.source = VALUES[name]
    draws = {seen(net, lambda m: draw(m.source)) for _ in range(3)}
    assert draws == {draw(net.source)}


def test_what_a_tuple_holds_is_copied() -> None:
    net = nn.Linear(1, 1)
    net.pair = Pair(torch.ones(1), [1])
    pair = seen(net, lambda m: m.pair)
    pair.a.add_(1)
    pair.b.append(2)
    assert float(net.pair.a) == 1.0
    assert net.pair.b == [1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_casting_changes_floating_point_only(dtype: torch.dtype) -> None:
    assert cast(torch.ones(2), dtype).dtype == dtype
    assert cast(torch.ones(2, dtype=torch.int32), dtype).dtype == torch.int32
    assert cast(torch.tensor([True]), dtype).dtype == torch.bool
    assert cast("words", dtype) == "words"
    same = torch.ones(2)
    assert cast(same, None) is same
    leaf = cast(torch.ones(2, requires_grad=True), dtype)
    assert leaf.requires_grad
    assert leaf.is_leaf
    inner = torch.ones(2, requires_grad=True)
    graph = cast(inner * 2, dtype)
    assert not graph.is_leaf  # still a function of what it was computed from
    assert not cast(torch.ones(2), dtype).requires_grad


def test_a_method_of_something_shared_is_shared() -> None:
    items: dict[int, Any] = {}
    shared = torch.optim.SGD([torch.ones(1)], lr=1.0)  # of a library: not copied
    copies = Copies(items)
    method = shared.state_dict
    assert copies.of(method) is method
    assert copies.of(len) is len
    assert copies.of(None) is None


def test_a_partial_is_made_anew_with_copies_of_what_it_holds() -> None:
    net = nn.Linear(1, 1)
    rows: list[int] = []
    net.add = functools.partial(lambda to, n, *, also: (to.append(n), also.append(n), to), rows, also=rows)
    _, _, inside = seen(net, lambda m: m.add(5))
    assert inside == [5, 5]  # the two stay one
    assert rows == []


# The sandbox around it.


def test_mixed_types_are_told_by_floating_point_parameters() -> None:
    assert not Sandbox(nn.Linear(2, 2)).is_mixed
    assert Sandbox(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())).is_mixed
    whole = nn.Linear(2, 2)
    whole.register_parameter("index", nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False))
    assert not Sandbox(whole).is_mixed


@pytest.mark.parametrize("mixed", [False, True])
def test_the_callers_autocast_is_kept_where_types_must_meet(mixed: bool) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16 if mixed else torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16), Sandbox(net) as sandbox:
        found = sandbox.evaluate(lambda m, x: m(x), torch.ones(1, 2), {})
        assert not torch.is_autocast_enabled("cpu")  # outside of an evaluation
    assert found.dtype == (torch.bfloat16 if mixed else torch.float32)
    if mixed:
        with pytest.raises(RuntimeError), Sandbox(net) as sandbox:
            sandbox.evaluate(lambda m, x: m(x), torch.ones(1, 2), {})


def test_a_stage_is_what_the_module_held_in_an_evaluation() -> None:
    net = nn.Linear(1, 1)
    net.count = [0]

    def loss(module: Any, n: Any) -> Tensor:
        module.count.append(n)
        module.last = n
        return module.weight.sum()

    with Sandbox(net) as sandbox:
        sandbox.evaluate(loss, 1, {})
        first = sandbox.stage()
        inside = net.count
        assert inside == [0, 1]
        sandbox.restage(first)  # nothing to do
        assert net.count is inside
        sandbox.evaluate(loss, 2, {})
        assert net.count == [0, 2]
        assert net.last == 2
        sandbox.restage(first)
        assert net.count is inside
        assert net.last == 1
    assert net.count == [0]
    assert not hasattr(net, "last")
    with Sandbox(net) as sandbox:  # it can be entered again, from the state of that moment
        net.count.append(9)
        sandbox.evaluate(loss, 3, {})
        assert net.count == [0, 9, 3]
    assert net.count == [0, 9]


def test_a_loss_is_a_finite_scalar_that_depends_on_something() -> None:
    p = torch.ones(1, requires_grad=True)
    assert check_loss(p).shape == ()
    assert check_loss((p * 2).reshape(1, 1)).shape == ()
    with pytest.raises(RuntimeError, match=r"scalar tensor, got shape \(2,\)"):
        check_loss(torch.ones(2))
    with pytest.raises(RuntimeError, match="scalar tensor, got float"):
        check_loss(1.0)
    for value in (float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match=f"finite loss, got {value}"):
            check_loss(p * value)
        assert not torch.isfinite(check_loss(p * value, finite=False))
    with pytest.raises(RuntimeError, match="got a constant"):
        check_loss(torch.ones(1))
    assert check_loss(torch.ones(1), constant=True) == 1.0
    with torch.no_grad():
        assert check_loss(torch.ones(1)) == 1.0  # nobody could differentiate it anyway


def test_generators_are_put_back_after_an_error_too() -> None:
    def fails() -> None:
        with preserve_rng():
            seed_everything(3)
            raise ValueError("on purpose")

    before = random_states()
    with pytest.raises(ValueError, match="on purpose"):
        fails()
    after = random_states()
    assert torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"][1], after["numpy"][1])
    assert before["python"] == after["python"]


def test_a_seed_means_the_same_numbers_everywhere() -> None:
    with preserve_rng():
        draws = []
        for _ in range(2):
            seed_everything(11)
            draws.append((float(torch.rand(1)), float(np.random.rand()), random.random()))  # noqa: NPY002
        assert draws[0] == draws[1]
        assert draws[0][2] == random.Random(11).random()
        assert draws[0][1] == np.random.RandomState(11).rand()
        assert draws[0][0] == float(torch.rand(1, generator=torch.Generator().manual_seed(11)))


def test_what_hangs_on_a_function_that_holds_parameters_is_there() -> None:
    net = nn.Linear(2, 1)

    def penalty(strength: float = 2.0, *, held: Tensor = net.weight) -> Tensor:
        return strength * held.square().sum()

    penalty.of = "the weights"  # type: ignore[attr-defined]
    penalty.also = [net.weight]  # type: ignore[attr-defined]
    net.penalty = penalty
    alias = torch.full((1, 2), 3.0)

    def loss(module: Any, _: Any) -> Tensor:
        assert module.penalty.of == "the weights"
        assert module.penalty.also[0] is alias
        return module.penalty()

    with Sandbox(net) as sandbox:
        assert float(sandbox.evaluate(loss, None, {net.weight: alias})) == 36.0
    assert penalty.also[0] is net.weight  # type: ignore[attr-defined]
