"""Fingerprints of a run's state: what a reading changed although it must not, and where.

The sandbox isolates what hangs on a module as a tensor, array, generator, built-in container or small object of the
user's own classes. Behind any other object it isolates nothing, but what changed there can be seen. Reading runs no
code of the user's: no property, no ``__getattr__``, no ``__iter__``; instances are read from their ``__dict__`` and
slots.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.isolation.digests import (
    bytes_digest,
    content_digest,
    frozen,
    generator_digest,
    key_digest,
    scalar_digest,
)
from eos_monitor.isolation.referents import (
    Referents,
    attributes,
    is_library,
    is_machinery,
    read_module,
    read_object,
    read_special,
)
from eos_monitor.isolation.sandbox import random_states

MAX_BYTES = 64 * 2**20  # of tensors, arrays and byte strings behind one attribute
MAX_ENTRIES = 20_000  # of containers and objects behind one attribute
_MAX_DEPTH = 24


@dataclass(frozen=True)
class Fingerprint:
    """Digests of what can be reached at one moment, by place.

    Attributes:
        digests: Place -> a value that is equal as long as nothing changed there.
        uncovered: Places that were too large to be compared by content, or cannot be.
        alive: What is compared by identity, kept so that no other object can take its address.
    """

    digests: dict[str, Any]
    uncovered: tuple[str, ...]
    alive: list[Any]

    def changes(self, later: Fingerprint) -> list[str]:
        """Name the places at which ``later`` differs, those inside a place already named left out."""
        # What comes or goes changes the digest of what holds it, so common places are enough.
        differ = [place for place, digest in self.digests.items() if later.digests.get(place, digest) != digest]
        named = set(differ)
        return [place for place in differ if not any(holder in named for holder in _holders(place))]


def fingerprint(
    module: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    *,
    also: Mapping[str, Any] | None = None,
    leave_out: Iterable[Any] = (),
) -> Fingerprint:
    """Digest a module, its optimizers and the global random generators, with all that can be reached from them.

    Parameters, buffers, gradients and optimizer state are compared whole. Behind each other attribute up to 64 MB of
    tensors and arrays and 20,000 entries are compared by content, what exceeds that by identity and version counter.

    Args:
        module: Module, with its sub-modules.
        optimizers: Its optimizers.
        also: Other objects, by name.
        leave_out: Objects that are not read.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # pickling support of itertools is deprecated
        traversal = _Traversal(leave_out)
        modules = dict(_registered(module))
        # These first, so that a tensor goes by the name that users know it by, and counts against no bound.
        for place, child in modules.items():
            for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
                traversal.visit(_join(place, name), tensor, _Budget(math.inf, math.inf))
        for i, optimizer in enumerate(optimizers):
            place = "optimizer" if len(optimizers) == 1 else f"optimizers[{i}]"
            traversal.visit(f"{place}.state", optimizer.state, _Budget(math.inf, math.inf))
            traversal.visit(f"{place}.param_groups", optimizer.param_groups, _Budget(math.inf, math.inf))
            traversal.visit(place, optimizer)
        for place, child in modules.items():
            traversal.visit_module(place, child)
        for name, value in (also or {}).items():
            traversal.visit(name, value)
        traversal.visit_generators()
        return traversal.fingerprint()


class _Budget:
    """What may still be compared by content."""

    def __init__(self, entries: float = MAX_ENTRIES, nbytes: float = MAX_BYTES) -> None:
        self._entries = entries
        self._nbytes = nbytes

    def take(self, *, entries: int = 0, nbytes: int = 0) -> bool:
        """Take from what is left; False if it is too little."""
        if entries > self._entries or nbytes > self._nbytes:
            return False
        self._entries -= entries
        self._nbytes -= nbytes
        return True


class _Traversal:
    """Digests of all that was reached so far, each object visited once."""

    def __init__(self, leave_out: Iterable[Any]) -> None:
        self._digests: dict[str, Any] = {}
        self._uncovered: list[str] = []
        self._alive: list[Any] = list(leave_out)
        self._seen: dict[int, Any] = {id(value): "left out" for value in self._alive}
        self._names: dict[int, str] = {}

    def visit(self, place: str, value: Any, budget: _Budget | None = None) -> None:
        """Digest a value and what can be reached from it, nearest first."""
        budget = budget or _Budget()
        queue = deque([(place, value, 0)])
        while queue:
            place, value, depth = queue.popleft()
            scalar = scalar_digest(value)
            if scalar is not None:
                self._digests[place] = scalar
            elif id(value) in self._seen:
                self._digests[place] = self._seen[id(value)]
            else:
                # Before its referents, so that cycles end.
                self._alive.append(value)
                self._names[id(value)] = place
                digest, referents = self._read(place, value, budget)
                self._seen[id(value)] = self._digests[place] = digest
                if depth < _MAX_DEPTH:
                    queue.extend((place + suffix, item, depth + 1) for suffix, item in referents)
                elif referents:
                    self._uncovered.append(place)

    def visit_module(self, place: str, module: nn.Module) -> None:
        """Digest a registered module; each of its attributes has a budget of its own."""
        self._alive.append(module)
        digest, referents = read_module(module)
        self._seen[id(module)] = digest
        self._digests[place or "the module"] = digest
        for suffix, value in referents:
            # Registered children have their own turn.
            if suffix[1:] not in module._modules:
                self.visit((place + suffix).removeprefix("."), value)
        self._visit_class(type(module))

    def visit_generators(self) -> None:
        """Digest the global random generators."""
        for name, state in random_states().items():
            self._digests[f"the random state of {name}"] = frozen(state)

    def fingerprint(self) -> Fingerprint:
        """Return what was found."""
        return Fingerprint(self._digests, tuple(dict.fromkeys(self._uncovered)), self._alive)

    # ------------------------------------------------------------------ one value

    def _read(self, place: str, value: Any, budget: _Budget) -> tuple[Any, Referents]:
        """Return the digest of a value without its referents, and the referents."""
        kind: Any = type(value)
        # By the type, not by isinstance, which asks the object for its __class__: that may be a property.
        if issubclass(kind, Tensor):
            return self._tensor(place, value, budget)
        if issubclass(kind, np.ndarray) and value.dtype != object:
            return self._array(place, value, budget)
        if issubclass(kind, (list, tuple, deque, dict, set, frozenset, np.ndarray)):
            return self._container(place, value, budget)
        if issubclass(kind, bytearray):
            return self._array(place, np.frombuffer(bytes(value), np.uint8), budget)
        if issubclass(kind, nn.Module):
            self._visit_class(kind)
            return self._within(budget, place, read_module(value))
        if is_machinery(kind):
            return ("left out", id(value)), ()
        generator = generator_digest(value)
        if generator is not None:
            return generator, ()
        if issubclass(kind, type):
            self._visit_class(value)
            return ("class", id(value)), ()
        if issubclass(kind, io.TextIOWrapper):
            self._uncovered.append(place)
        special = read_special(value)
        if special is None:
            self._visit_class(kind)
            special = read_object(value)
        return self._within(budget, place, special)

    def _within(self, budget: _Budget, place: str, read: tuple[Any, Referents]) -> tuple[Any, Referents]:
        """Return what was read of an object, without its referents where they are too many."""
        referents = list(read[1])
        if budget.take(entries=len(referents)):
            return read[0], referents
        self._uncovered.append(place)
        return read[0], ()

    def _tensor(self, place: str, value: Tensor, budget: _Budget) -> tuple[Any, Referents]:
        with torch._C.DisableTorchFunctionSubclass():
            held = list(attributes(value))
            if nn.parameter.is_lazy(value):
                return ("not materialized", id(value)), held
            version = None if value.is_inference() else value._version
            # The slot of a leaf only: elsewhere reading it warns.
            gradient = [(".grad", value.grad)] if value.is_leaf else []
            facts = (value.dtype, tuple(value.shape), value.device, value.requires_grad, version)
            nbytes = value._values().nbytes if value.layout == torch.sparse_coo else value.nbytes
            content = content_digest(value) if budget.take(nbytes=nbytes) else None
            if content is None:
                self._uncovered.append(place)
                content = id(value)
            return (*facts, content), [*gradient, *held]

    def _array(self, place: str, value: Any, budget: _Budget) -> tuple[Any, Referents]:
        array = np.ndarray.view(value, np.ndarray)
        covered = budget.take(nbytes=array.nbytes)
        if not covered:
            self._uncovered.append(place)
        content = bytes_digest(array) if covered else id(value)
        return (array.dtype, array.shape, content), list(attributes(value))

    def _container(self, place: str, value: Any, budget: _Budget) -> tuple[Any, Referents]:
        kind = type(value)
        keys: list[Any] | None = None
        # By the methods of the built-in type: a subclass may have its own.
        if issubclass(kind, dict):
            pairs = list((OrderedDict if issubclass(kind, OrderedDict) else dict).items(value))
            keys = [key for key, _ in pairs]
            items = [item for _, item in pairs]
        elif issubclass(kind, np.ndarray):
            items = list(np.ndarray.flatten(value))  # of dtype object
        else:
            base: Any = next(base for base in (list, tuple, deque, set, frozenset) if issubclass(kind, base))
            items = list(base.__iter__(value))
        if not budget.take(entries=len(items)):
            self._uncovered.append(place)
            self._alive.append((keys, items))
            return (kind, len(items), tuple(map(id, items))), ()
        if keys is not None:
            names = [f"[{self._name(key, i)}]" for i, key in enumerate(keys)]
            digest: Any = (kind, tuple(map(key_digest, keys)))
            self._alive.append(keys)
        else:
            names = [f"[{i}]" for i in range(len(items))]
            in_no_order = issubclass(kind, (set, frozenset))
            digest = (kind, frozenset(map(key_digest, items)) if in_no_order else len(items))
        return digest, [*zip(names, items, strict=True), *attributes(value)]

    def _name(self, key: Any, i: int) -> str:
        if type(key) in (str, int, bool, float):
            return repr(key)
        return self._names.get(id(key), f"<{type(key).__name__} {i}>")

    def _visit_class(self, kind: type) -> None:
        """Digest the data that a class of the user's holds."""
        for cls in type.__dict__["__mro__"].__get__(kind):
            if id(cls) in self._seen or is_library(cls):
                continue
            self._alive.append(cls)
            self._seen[id(cls)] = ("class", id(cls))
            for name, value in list(type.__dict__["__dict__"].__get__(cls).items()):
                if not name.startswith("__") and not hasattr(type(value), "__get__"):
                    self.visit(f"{cls.__qualname__.split('.')[-1]}.{name}", value)


def _registered(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    queue = deque([("", module)])
    while queue:
        place, module = queue.popleft()
        if id(module) not in seen:
            seen.add(id(module))
            yield place, module
            queue.extend((_join(place, name), child) for name, child in module._modules.items() if child is not None)


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _holders(place: str) -> Iterator[str]:
    for i, character in enumerate(place):
        if character in ".[":
            yield place[:i]
