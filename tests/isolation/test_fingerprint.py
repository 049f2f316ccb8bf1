"""What a fingerprint covers, how it calls it, and where it stops."""

from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from eos_monitor.isolation.fingerprint import MAX_BYTES, MAX_ENTRIES, Fingerprint, fingerprint


class Box:
    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


def holder(**attributes: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    module.__dict__.update(attributes)
    return module


def changed(module: nn.Module, change: Any, *optimizers: Any, **settings: Any) -> list[str]:
    before = fingerprint(module, optimizers, **settings)
    change()
    return before.changes(fingerprint(module, optimizers, **settings))


def test_only_the_outermost_place_of_a_change_is_named() -> None:
    before = Fingerprint({"a": 1, "a.b": 1, "a[0].c": 1, "ab": 1, "c.d": 1, "c.d.e": 1, "gone": 1}, (), [])
    later = Fingerprint({"a": 2, "a.b": 2, "a[0].c": 2, "ab": 2, "c.d": 1, "c.d.e": 2, "new": 1}, (), [])
    assert before.changes(later) == ["a", "ab", "c.d.e"]
    assert before.changes(before) == []


@pytest.mark.parametrize(("entries", "covered"), [(MAX_ENTRIES, True), (MAX_ENTRIES + 1, False)])
def test_twenty_thousand_entries_are_compared(entries: int, covered: bool) -> None:
    module = holder(rows=[0] * entries)
    before = fingerprint(module)
    assert before.uncovered == (() if covered else ("rows",))
    module.rows[3] = 1
    assert before.changes(fingerprint(module)) == ["rows[3]" if covered else "rows"]


@pytest.mark.parametrize(("extra", "covered"), [(0, True), (1, False)])
@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_64_megabytes_are_compared(kind: str, extra: int, covered: bool) -> None:
    size = MAX_BYTES + extra
    value: Any = torch.zeros(size, dtype=torch.uint8) if kind == "tensor" else np.zeros(size, np.uint8)
    module = holder(data=value)
    before = fingerprint(module)
    assert before.uncovered == (() if covered else ("data",))
    if kind == "array":
        value[5] = 1  # has no version counter: beyond the bound it cannot be seen
        assert before.changes(fingerprint(module)) == (["data"] if covered else [])


def test_each_attribute_has_bounds_of_its_own_that_what_it_holds_shares() -> None:
    half = MAX_ENTRIES // 2 + 1
    module = holder(one=[0] * half, other=[0] * half, both=Box(a=[0] * half, b=[0] * half))
    assert fingerprint(module).uncovered == ("both.b",)
    quarter = [np.zeros(MAX_BYTES // 2 + 1, np.uint8) for _ in range(2)]
    module = holder(one=quarter[0], both=[np.zeros(MAX_BYTES // 2 + 1, np.uint8) for _ in range(2)])
    assert fingerprint(module).uncovered == ("both[1]",)


def test_parameters_buffers_and_optimizer_state_have_none() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(MAX_BYTES // 4 + 1))
            self.register_buffer("table", torch.zeros(MAX_BYTES + 1, dtype=torch.uint8))

    module = Large()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[module.weight]["momentum_buffer"] = torch.zeros(MAX_BYTES // 4 + 1)
    assert fingerprint(module, [optimizer]).uncovered == ()


@pytest.mark.parametrize(("depth", "covered"), [(23, True), (25, False)])
def test_two_dozen_objects_behind_one_another_are_followed(depth: int, covered: bool) -> None:
    last = Box(value=0)
    chain = last
    for _ in range(depth - 1):
        chain = Box(next=chain)
    module = holder(chain=chain)
    before = fingerprint(module)
    assert (before.uncovered == ()) is covered
    last.value = 1
    assert bool(before.changes(fingerprint(module))) is covered


def test_optimizers_are_named_by_number_where_there_are_several() -> None:
    module = nn.Linear(2, 2)
    one, two = torch.optim.SGD([module.weight], lr=0.1), torch.optim.SGD([module.bias], lr=0.1)
    assert changed(module, lambda: one.param_groups[0].update(lr=0.2), one) == ["optimizer.param_groups[0]['lr']"]
    found = changed(module, lambda: two.param_groups[0].update(lr=0.2), one, two)
    assert found == ["optimizers[1].param_groups[0]['lr']"]
    assert changed(module, lambda: setattr(two, "mine", [1]), one, two) == ["optimizers[1]"]

    def momentum() -> None:
        two.state[module.bias]["momentum_buffer"].add_(1)

    two.state[module.bias]["momentum_buffer"] = torch.zeros(2)
    assert changed(module, momentum, one, two) == ["optimizers[1].state[bias]['momentum_buffer']"]


def test_gradients_are_looked_at_too() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].weight.grad = torch.zeros(2, 2)
    assert changed(module, lambda: module[0].weight.grad.add_(1)) == ["0.weight.grad"]
    assert changed(module, lambda: setattr(module[0].weight, "grad", None)) != []


def test_other_objects_go_by_the_names_that_they_are_given() -> None:
    box = Box(rows=[1])
    assert changed(nn.Linear(1, 1), lambda: box.rows.append(2), also={"the box": box}) == ["the box.rows"]


def test_what_is_left_out_is_not_read() -> None:
    box, other = Box(n=0), Box(n=0)

    def change() -> None:
        box.n = other.n = 1

    assert changed(holder(box=box, other=other), change, leave_out=[box]) == ["other.n"]


@pytest.mark.parametrize(
    ("value", "change", "place"),
    [
        (deque([1, 2]), lambda v: v.appendleft(0), "kept"),
        (OrderedDict(a=1, b=2), lambda v: v.move_to_end("a"), "kept"),
        ({(1, 2): [0]}, lambda v: v[1, 2].append(1), "kept[<tuple 0>]"),
        ({1: 0, "a": 0, True + 1: 0}, lambda v: v.update({2: 5}), "kept[2]"),
        ({1, 2}, lambda v: v.discard(1), "kept"),
        (bytearray(b"ab"), lambda v: v.__setitem__(0, 0), "kept"),
        (np.array([[1, 2]]), lambda v: v.__setitem__((0, 1), 3), "kept"),
        (np.array([[1], None], dtype=object), lambda v: v[0].append(1), "kept[0]"),
        (torch.zeros(2).requires_grad_(), lambda v: v.requires_grad_(False), "kept"),
        (([1], [2]), lambda v: v[1].append(1), "kept[1]"),
    ],
)
def test_places_inside_containers(value: Any, change: Any, place: str) -> None:
    assert changed(holder(kept=value), lambda: change(value)) == [place]


def test_equal_contents_in_another_object_are_a_change_only_where_it_counts() -> None:
    """A list that is replaced by an equal one holds the same; one that is another kind does not."""
    module = holder(kept=[1, 2], table={"a": 1})

    def replace_both() -> None:
        module.kept = [1, 2]
        module.table = OrderedDict(a=1)

    assert changed(module, replace_both) == ["table"]


def test_data_on_classes_is_read() -> None:
    class Counted(nn.Linear):
        calls: Any = [0]

    module = Counted(1, 1)
    assert changed(module, lambda: module.calls.append(1)) == ["Counted.calls"]


def test_children_are_named_by_their_place_and_read_once() -> None:
    child = nn.Linear(1, 1)
    module = nn.Sequential(OrderedDict(first=child, second=nn.Sequential(child)))
    child.mark = [0]
    assert changed(module, lambda: child.mark.append(1)) == ["first.mark"]
    with torch.no_grad():
        assert changed(module, lambda: child.weight.add_(1)) == ["first.weight"]


def test_the_bounds_are_those_of_the_page() -> None:
    assert (MAX_BYTES, MAX_ENTRIES) == (64 * 2**20, 20_000)


@pytest.mark.parametrize(("count", "covered"), [(MAX_ENTRIES, True), (MAX_ENTRIES + 1, False)])
def test_an_object_of_too_many_attributes_is_named(count: int, covered: bool) -> None:
    box = Box(**{f"a{i}": i for i in range(count)})
    module = holder(box=box)
    before = fingerprint(module)
    assert before.uncovered == (() if covered else ("box",))
    box.a7 = -1
    assert before.changes(fingerprint(module)) == (["box.a7"] if covered else [])
