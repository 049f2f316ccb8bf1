"""Copies of what holds state, each made once, so that what was one object stays one object."""

from __future__ import annotations

import copy
import functools
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eos_monitor.isolation.holdings import contents, held_by, is_plain, survey
from eos_monitor.isolation.referents import is_library

_CONSTANTS = (bool, int, float, str, bytes, type)
_CONTAINERS = (list, deque, dict, OrderedDict, defaultdict, Counter)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


class Copies:
    """Copies of tensors, arrays, generators, containers and objects of the user's own; anything else is shared.

    A small object of a class written in Python (a meter that counts, a regularizer that holds parameters) is copied
    with what it holds, and so is a function that closes over such an object, or over parameters. Modules, and what
    comes with the libraries, are not.

    Args:
        memo: What stands for an object, by its ``id``, in place of a copy; what is copied is entered.
        dtype: Floating-point type of the tensors; None leaves theirs.
    """

    def __init__(self, memo: dict[int, Any], dtype: torch.dtype | None = None) -> None:
        self._memo = memo
        self._dtype = dtype
        self._parameters = frozenset(memo)

    def of(self, value: Any) -> Any:
        """Return the copy of a value."""
        if value is None or isinstance(value, _CONSTANTS):
            return value
        if id(value) not in self._memo:
            self._memo[id(value)] = self._copied(value)
        return self._memo[id(value)]

    def where_needed(self, value: Any) -> Any:
        """Return the copy of a value that holds parameters, and any other value as it is."""
        return self.of(value) if survey(value, self._is_parameter)[1] else value

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

    def _container(self, value: Any) -> Any:
        duplicate = copy.copy(value)
        self._memo[id(value)] = duplicate  # before its items, so that cycles end
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
            owner = self.of(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if kind is types.FunctionType and not is_library(value):
            return self._function(value)
        return self._instance(value) if is_plain(kind) else value

    def _instance(self, value: Any) -> Any:
        small, _ = survey(value, self._is_parameter)
        if not small:
            return value
        duplicate = object.__new__(type(value))
        self._memo[id(value)] = duplicate  # before what it holds, so that cycles end
        for name, held in held_by(value).items():
            # Not by the class's own __setattr__, which may do anything.
            object.__setattr__(duplicate, name, self.of(held))
        return duplicate

    def _function(self, value: types.FunctionType) -> Any:
        self._memo[id(value)] = value  # a function can close over itself
        cells = value.__closure__ or ()
        closed = tuple(self._cell(cell) for cell in cells)
        defaults = tuple(self.where_needed(default) for default in value.__defaults__ or ())
        before = (*cells, *(value.__defaults__ or ()))
        if all(new is old for new, old in zip((*closed, *defaults), before, strict=True)):
            return value
        duplicate = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, closed)
        duplicate.__kwdefaults__ = value.__kwdefaults__
        duplicate.__dict__.update(value.__dict__)
        return duplicate

    def _cell(self, cell: types.CellType) -> types.CellType:
        for held in contents(cell):
            # A list that a hook fills is read elsewhere too, perhaps where no copy of it reaches.
            kind: Any = type(held)
            if is_plain(kind) or survey(held, self._is_parameter)[1]:
                copied = self.of(held)
                return cell if copied is held else types.CellType(copied)
        return cell

    def _is_parameter(self, value: Any) -> bool:
        return id(value) in self._parameters


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Return a floating-point tensor in another type, and anything else as it is; None leaves that too."""
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_() if value.is_leaf and value.requires_grad else value.to(dtype)
