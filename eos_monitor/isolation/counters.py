"""Plain objects of the user's that hold state beside a module: meters, counters, buffers, regularizers."""

from __future__ import annotations

import abc
import functools
import inspect
import types
import typing
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from eos_monitor.isolation.referents import attributes, held_by, is_library

# What a meter, an average of weights or a replay buffer of a few batches has; a data set has more.
_MOST_ENTRIES = 4096
_MOST_BYTES = 2**26
_BASES = (object, list, dict, types.SimpleNamespace, abc.ABC, typing.Generic, typing.Protocol)
# Whoever writes one of these says that an object is more than what it holds.
_OWN_WAY = ("__del__", "__copy__", "__deepcopy__", "__getattribute__")
_NUMBERS = (bool, int, float, str, bytes)
_FUNCTIONS = (functools.partial, types.MethodType, types.FunctionType)
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


class Counters:
    """Tells which objects are plain and small enough to be copied, and where parameters are held.

    Plain is an instance of a class of the user's own, all the way up to ``object``, ``list`` or ``dict``: what it is
    lies in its attributes and entries. Everything else is shared, because a copy could be something else.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, bool]] = {}  # with the object, so that its id stays its own

    def include(self, value: Any, memo: Mapping[int, Any]) -> bool:
        """Whether to copy an object.

        Args:
            value: Object.
            memo: What is not copied with it, by its ``id``: parameters have stand-ins.
        """
        if not _is_plain(type(value)):
            return False
        if id(value) not in self._found:
            self._found[id(value)] = (value, _is_small(value, memo))
        return self._found[id(value)][1]

    def holds_any(self, values: Iterable[Any], parameters: Collection[int]) -> bool:
        """Whether parameters are among values, or are held by what can be copied of them.

        Args:
            values: Values; modules, and what comes with libraries, are not entered.
            parameters: The ``id`` of each parameter.
        """
        seen: dict[int, Any] = {}
        waiting = list(values)
        while waiting and len(seen) <= _MOST_ENTRIES:
            held = waiting.pop()
            if id(held) in parameters:
                return True
            if id(held) not in seen and not isinstance(held, _NUMBERS):
                seen[id(held)] = held
                waiting += _entries(held)
        return False


def duplicate(value: Any, copy: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
    """Return a copy of a plain object, made without running any code of its class.

    Args:
        value: Object.
        copy: Copies what it holds.
        memo: The copy is entered before what it holds is copied, so that cycles end.
    """
    kind = type(value)
    base: Any = next(base for base in (dict, list, types.SimpleNamespace, object) if issubclass(kind, base))
    twin = base.__new__(kind)
    memo[id(value)] = twin
    if base is dict:
        dict.update(twin, {key: copy(item) for key, item in dict.items(value)})
    elif base is list:
        list.extend(twin, [copy(item) for item in list.__iter__(value)])
    for place, item in attributes(value):
        name = place[1:]
        if type(inspect.getattr_static(kind, name, None)) is types.MemberDescriptorType:
            object.__setattr__(twin, name, copy(item))  # a slot
        else:
            object.__getattribute__(twin, "__dict__")[name] = copy(item)
    return twin


def _is_plain(kind: type) -> bool:
    if not kind.__flags__ & _HEAP and kind is not types.SimpleNamespace:
        return False
    for cls in kind.__mro__:
        if cls not in _BASES and (is_library(cls) or any(name in vars(cls) for name in _OWN_WAY)):
            return False
    return True


def _is_small(value: Any, memo: Mapping[int, Any]) -> bool:
    entries = 0
    size = 0
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting and entries <= _MOST_ENTRIES and size <= _MOST_BYTES:
        held = waiting.pop()
        if id(held) in seen or id(held) in memo:
            continue
        seen[id(held)] = held
        if isinstance(held, (Tensor, np.ndarray)):
            size += held.nbytes
        # What functions and methods are bound to is judged by itself.
        items = [] if type(held) in _FUNCTIONS else _entries(held)
        entries += len(items)
        waiting += items
    return not waiting


def _entries(value: Any) -> list[Any]:
    """Return what a copy of a value would hold copies of."""
    kind: Any = type(value)
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values()]
    if kind is types.MethodType:
        return [value.__self__]
    if kind is types.FunctionType:
        return [] if is_library(value) else [item for _, item in held_by(value)]
    items: list[Any] = []
    if isinstance(value, dict):
        items += dict.values(value)
    elif isinstance(value, (list, tuple, set, deque)):
        items += value
    if _is_plain(kind):
        items += [item for _, item in attributes(value)]
    return items
