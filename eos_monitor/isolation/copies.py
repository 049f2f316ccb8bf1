"""Copies of what holds state, each made once, so that what was one object stays one object."""

from __future__ import annotations

import copy
import functools
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eos_monitor.isolation.counters import Counters, duplicate
from eos_monitor.isolation.journal import FilledFirst, Journal, is_long
from eos_monitor.isolation.referents import held_by, is_library

_CONSTANTS = (bool, int, float, str, bytes, type)
_CONSTANT_TYPES = frozenset({bool, int, float, str, bytes, type(None)})
_CONTAINERS = (list, deque, dict, OrderedDict, defaultdict, Counter)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


class Copies:
    """Copies of tensors, arrays, generators, built-in containers and small plain objects; anything else is shared.

    A function of the user's is copied if it holds parameters, in its closure or its defaults.

    Args:
        memo: What stands for an object, by its ``id``, in place of a copy; what is copied is entered.
        dtype: Floating-point type of the tensors; None leaves theirs.
        counters: Tells which objects are plain; one's own by default.
        put_off: Whether long lists are copied when they are looked at, to be used within :meth:`in_use`.
    """

    def __init__(
        self,
        memo: dict[int, Any],
        dtype: torch.dtype | None = None,
        counters: Counters | None = None,
        *,
        put_off: bool = False,
    ) -> None:
        self._memo = memo
        self._dtype = dtype
        self._counters = counters or Counters()
        self._parameters = frozenset(memo)
        self._put_off = put_off
        self._journals: list[Journal] = []

    def of(self, value: Any) -> Any:
        """Return the copy of a value."""
        if value is None or isinstance(value, _CONSTANTS):
            return value
        if id(value) not in self._memo:
            self._memo[id(value)] = self._copied(value)
        return self._memo[id(value)]

    def where_needed(self, value: Any) -> Any:
        """Return the copy of a value that holds parameters, and any other value as it is."""
        return self.of(value) if self._counters.holds_any([value], self._parameters) else value

    def _copied(self, value: Any) -> Any:
        if type(value) in _CONTAINERS:
            return self._container(value)
        if isinstance(value, Tensor):
            if nn.parameter.is_lazy(value):
                return value
            return cast(value.detach().clone(), self._dtype).requires_grad_(value.requires_grad)
        if isinstance(value, tuple):
            items = [self.of(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if type(value) in (set, bytearray):
            return copy.copy(value)
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, _GENERATORS):
            return copy.deepcopy(value)
        return self._other(value)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Copy what was put off when it is looked at, and let go of everything else at the end."""
        try:
            with FilledFirst() if self._journals else nullcontext():
                yield
        finally:
            # A backward that recomputes may still look. Copies of its own, or each journal would keep the memo alive.
            for journal in self._journals:
                journal.entrust(Copies({}, self._dtype).of)
            self._journals = []

    def _container(self, value: Any) -> Any:
        if self._put_off and type(value) is list and is_long(value):
            journal = Journal(value, self.of)
            self._journals.append(journal)
            return journal
        duplicate = copy.copy(value)
        self._memo[id(value)] = duplicate  # before its items, so that cycles end
        items = value.values() if hasattr(value, "values") else value
        if _CONSTANT_TYPES.issuperset(map(type, items)):
            return duplicate
        # An index is the key of a list or deque.
        for key, item in value.items() if hasattr(value, "items") else enumerate(value):
            duplicate[key] = self.of(item)
        return duplicate

    def _other(self, value: Any) -> Any:
        """Return what stands for an object of any other kind."""
        kind: Any = type(value)
        if kind is functools.partial:
            return functools.partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        if kind is types.MethodType:
            holder = self.of(value.__self__)
            return value if holder is value.__self__ else types.MethodType(value.__func__, holder)
        if kind is types.FunctionType and not is_library(value):
            return self._function(value)
        return duplicate(value, self.of, self._memo) if self._counters.include(value, self._memo) else value

    def _function(self, value: types.FunctionType) -> Any:
        self._memo[id(value)] = value  # a function can close over itself
        # Only for parameters: what a hook leaves in a list or an object is read elsewhere too, perhaps by code that no
        # copy of it reaches.
        if not self._counters.holds_any([item for _, item in held_by(value)], self._parameters):
            return value
        cells = tuple(self._cell(cell) for cell in value.__closure__ or ())
        defaults = tuple(self.where_needed(default) for default in value.__defaults__ or ())
        twin = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells)
        self._memo[id(value)] = twin
        twin.__kwdefaults__ = {name: self.where_needed(item) for name, item in (value.__kwdefaults__ or {}).items()}
        twin.__dict__.update({name: self.where_needed(item) for name, item in vars(value).items()})
        return twin

    def _cell(self, cell: types.CellType) -> types.CellType:
        try:
            held = cell.cell_contents
        except ValueError:
            return cell  # not assigned yet
        copied = self.where_needed(held)
        return cell if copied is held else types.CellType(copied)


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Return a floating-point tensor in another type, and anything else as it is; None leaves that too."""
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_() if value.is_leaf and value.requires_grad else value.to(dtype)
