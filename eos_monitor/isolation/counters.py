"""Plain objects of the user's that hold state beside a module: meters, counters, buffers, regularizers."""

from __future__ import annotations

import abc
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from eos_monitor.isolation.referents import attributes, is_library

# What a meter, an average of weights or a replay buffer of a few batches has; a data set has more.
_MOST_ENTRIES = 4096
_MOST_BYTES = 2**26
_BASES = (object, list, dict, types.SimpleNamespace, abc.ABC, typing.Generic, typing.Protocol)
# Whoever writes one of these says that an object is more than what it holds.
_OWN_WAY = ("__del__", "__copy__", "__deepcopy__", "__getattribute__")
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


class Counters:
    """Tells which objects are plain and small enough to be copied, and copies them.

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
        items: list[Any] = []
        if isinstance(held, (Tensor, np.ndarray)):
            size += held.nbytes
        elif isinstance(held, dict):
            items += dict.values(held)
        elif isinstance(held, (list, tuple, set)):
            items += held
        if _is_plain(type(held)):
            items += [item for _, item in attributes(held)]
        entries += len(items)
        waiting += items
    return not waiting
