"""What objects of the user's own hold: whether they can be copied, and whether parameters are among it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from eos_monitor.isolation.referents import is_library, is_machinery

# Beyond these an object is no counter and no regularizer, and a copy for each evaluation would cost too much.
_MOST_REFERENTS = 1000
_MOST_ELEMENTS = 10**6
# Bases that add nothing to an instance.
_EMPTY_BASES = ("abc", "typing", "collections.abc", "typing_extensions")


@functools.cache
def is_plain(kind: Any) -> bool:
    """Whether instances of a class are the user's, and nothing but their attributes."""
    if issubclass(kind, (nn.Module, Tensor)) or is_machinery(kind) or hasattr(kind, "__del__"):
        return False
    for cls in kind.__mro__[:-1]:
        if cls.__module__ not in _EMPTY_BASES and is_library(cls):
            return False
    return kind.__new__ is object.__new__ or "Generic" in {cls.__name__ for cls in kind.__mro__}


def held_by(value: Any) -> dict[str, Any]:
    """Return what an instance holds in its ``__dict__`` and slots, by name."""
    found = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        for name, member in vars(cls).items():
            if type(member) is types.MemberDescriptorType and hasattr(value, name):
                found[name] = member.__get__(value)
    return found


def survey(value: Any, is_parameter: Callable[[Any], bool]) -> tuple[bool, bool]:
    """Look through what hangs on a value; modules, and what comes with the libraries, are not entered.

    Returns:
        Whether it is small enough to be copied, and whether a parameter was found.
    """
    seen: dict[int, Any] = {}
    waiting = [value]
    elements = 0
    found = False
    while waiting and len(seen) < _MOST_REFERENTS and elements < _MOST_ELEMENTS:
        one = waiting.pop()
        if one is None or isinstance(one, (bool, int, float, str)) or id(one) in seen:
            continue
        seen[id(one)] = one
        if is_parameter(one):
            found = True
        elif isinstance(one, Tensor):
            elements += one.numel()
        else:
            waiting.extend(_referents(one))
    return not waiting and elements < _MOST_ELEMENTS, found


def _referents(value: Any) -> Iterable[Any]:
    kind: Any = type(value)
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set)):
        return value
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values()]
    if kind is types.MethodType:
        return [value.__self__]
    if kind is types.FunctionType:
        if is_library(value):
            return []
        return [
            *(value.__defaults__ or ()),
            *(content for cell in value.__closure__ or () for content in contents(cell)),
        ]
    return held_by(value).values() if is_plain(kind) else []


def contents(cell: types.CellType) -> list[Any]:
    """Return what a cell of a closure holds, as a list; empty if nothing was assigned yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []
