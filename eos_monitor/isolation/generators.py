"""The random generators that a module and its code can draw from."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from eos_monitor.isolation.digests import frozen, generator_digest
from eos_monitor.isolation.fingerprint import fingerprint
from eos_monitor.isolation.referents import is_library, is_machinery
from eos_monitor.isolation.sandbox import random_states

_ROUNDS = 4  # functions that call functions
_WRAPPED = (types.MethodType, staticmethod, classmethod)


class Generators:
    """The global generators, and those of the user's own that hang on a module, its functions, and their globals.

    Args:
        module: The module.
        leave_out: Objects that are not looked into.
    """

    def __init__(self, module: nn.Module, leave_out: tuple[Any, ...] = ()) -> None:
        reached: dict[str, Any] = {}
        for _ in range(_ROUNDS):
            alive = fingerprint(module, also=reached, leave_out=leave_out).alive
            more = dict(_used_by(alive))
            if more.keys() <= reached.keys():
                break
            reached |= more
        self._own = [value for value in alive if generator_digest(value) is not None]

    def states(self) -> list[Any]:
        """Return what they would draw next, as values that can be compared."""
        states = [generator_digest(value) for value in self._own]
        return [*states, *map(frozen, random_states().values())]


def _used_by(alive: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the methods of instances, and the globals that functions use, by name."""
    classes = {cls for value in alive for cls in type.__dict__["__mro__"].__get__(type(value)) if not is_library(cls)}
    members = [member for cls in classes for member in type.__dict__["__dict__"].__get__(cls).values()]
    for value in [*alive, *members]:
        function = value.__func__ if type(value) in _WRAPPED else value
        if type(function) is not types.FunctionType or is_library(function):
            continue
        yield f"{function.__module__}.{function.__qualname__}", function  # what it closes over
        for name in function.__code__.co_names:
            found = function.__globals__.get(name)
            if found is not None and not isinstance(found, type) and not is_machinery(_kind(found)):
                yield f"{function.__module__}.{name}", found


def _kind(value: Any) -> Any:
    return type(value)
