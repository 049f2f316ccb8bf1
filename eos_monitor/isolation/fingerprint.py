"""Fingerprints of a run's state: what a reading changed although it must not, and where.

The sandbox isolates what hangs on a module as a tensor, array, generator or built-in container. Behind an object of
any other kind it can isolate nothing, but what changed there can be seen. Looking runs no code of the user's: no
property, no ``__getattr__``, no ``__iter__``; instances are read from their ``__dict__`` and slots.
"""

from __future__ import annotations

import io
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.isolation.anatomy import (
    Children,
    attributes,
    is_library,
    is_machinery,
    look_at_module,
    look_at_object,
    look_at_special,
)
from eos_monitor.isolation.digests import (
    WordSum,
    bytes_digest,
    content_digest,
    frozen,
    generator_digest,
    key_digest,
    scalar_digest,
)

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
    """Look at a module, its optimizers and the global random generators, through all that hangs on them.

    Parameters, buffers, gradients and optimizer state are compared whole. Behind each other attribute up to 64 MB of
    tensors and arrays and 20,000 entries are compared by content, what exceeds that by identity and version counter.

    Args:
        module: Module to look at, with its sub-modules.
        optimizers: Optimizers to look at.
        also: Other objects, by name.
        leave_out: Objects that are not looked into.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # pickling support of itertools is deprecated
        walk = _Walk(leave_out)
        modules = dict(_registered(module))
        # These first, so that a tensor goes by the name that users know it by, and counts against no bound.
        for place, child in modules.items():
            for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
                walk.visit(_join(place, name), tensor, _Budget(None, None))
        for i, optimizer in enumerate(optimizers):
            place = "optimizer" if len(optimizers) == 1 else f"optimizers[{i}]"
            walk.visit(f"{place}.state", optimizer.state, _Budget(None, None))
            walk.visit(f"{place}.param_groups", optimizer.param_groups, _Budget(None, None))
            walk.visit(place, optimizer)
        for place, child in modules.items():
            walk.visit_module(place, child)
        for name, value in (also or {}).items():
            walk.visit(name, value)
        walk.visit_generators()
        return walk.finish()


class _Budget:
    """What may still be compared by content; None for all."""

    def __init__(self, entries: int | None = MAX_ENTRIES, nbytes: int | None = MAX_BYTES) -> None:
        self._entries, self._nbytes = entries, nbytes

    def take_entries(self, n: int) -> bool:
        if self._entries is None:
            return True
        if n > self._entries:
            return False
        self._entries -= n
        return True

    def take_bytes(self, n: int) -> bool:
        if self._nbytes is None:
            return True
        if n > self._nbytes:
            return False
        self._nbytes -= n
        return True


class _Walk:
    def __init__(self, leave_out: Iterable[Any]) -> None:
        self._digests: dict[str, Any] = {}
        self._uncovered: list[str] = []
        self._alive: list[Any] = list(leave_out)
        self._seen: dict[int, Any] = {id(value): "left out" for value in self._alive}
        self._names: dict[int, str] = {}
        self._sums: list[WordSum] = []

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
                # Before its children, so that cycles end.
                self._alive.append(value)
                self._names[id(value)] = place
                digest, children = self._look(place, value, budget)
                self._seen[id(value)] = self._digests[place] = digest
                if depth < _MAX_DEPTH:
                    queue.extend((place + suffix, child, depth + 1) for suffix, child in children)
                elif children:
                    self._uncovered.append(place)

    def visit_module(self, place: str, module: nn.Module) -> None:
        """Digest a registered module; each of its attributes has a budget of its own."""
        self._alive.append(module)
        digest, children = look_at_module(module)
        self._seen[id(module)] = digest
        self._digests[place or "the module"] = digest
        for suffix, value in children:
            # Registered children have their own turn.
            if suffix[1:] not in module._modules:
                self.visit((place + suffix).removeprefix("."), value)
        self._visit_class(type(module))

    def visit_generators(self) -> None:
        self._digests["the random state of torch"] = bytes_digest(torch.get_rng_state().numpy())
        self._digests["the random state of numpy"] = frozen(np.random.get_state())  # noqa: NPY002
        self._digests["the random state of python"] = random.getstate()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            states = torch.cuda.get_rng_state_all()
            self._digests["the random state of cuda"] = [bytes_digest(state.numpy()) for state in states]
        if torch.backends.mps.is_available():
            self._digests["the random state of mps"] = bytes_digest(torch.mps.get_rng_state().numpy())

    def finish(self) -> Fingerprint:
        # One synchronization a device for all of its tensors.
        by_device: dict[torch.device, list[WordSum]] = {}
        for entry in self._sums:
            by_device.setdefault(entry.pending.device, []).append(entry)
        for entries in by_device.values():
            for entry, value in zip(entries, torch.stack([e.pending for e in entries]).tolist(), strict=True):
                entry.value = value
                entry.pending = torch.empty(0)
        return Fingerprint(self._digests, tuple(dict.fromkeys(self._uncovered)), self._alive)

    # ------------------------------------------------------------------ one value

    def _look(self, place: str, value: Any, budget: _Budget) -> tuple[Any, Children]:
        """Return the digest of a value without what hangs on it, and what hangs on it."""
        kind: Any = type(value)
        # By the type, not by isinstance, which asks the object for its __class__: that may be a property.
        if issubclass(kind, Tensor):
            return self._look_at_tensor(place, value, budget)
        if issubclass(kind, np.ndarray) and value.dtype != object:
            return self._look_at_array(place, value, budget)
        if issubclass(kind, (list, tuple, deque, dict, set, frozenset, np.ndarray)):
            return self._look_at_container(place, value, budget)
        if issubclass(kind, bytearray):
            return self._look_at_array(place, np.frombuffer(bytes(value), np.uint8), budget)
        if issubclass(kind, nn.Module):
            self._visit_class(kind)
            return self._counted(place, look_at_module(value), budget)
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
        special = look_at_special(value)
        if special is None:
            self._visit_class(kind)
            special = look_at_object(value)
        return self._counted(place, special, budget)

    def _counted(self, place: str, seen: tuple[Any, Children], budget: _Budget) -> tuple[Any, Children]:
        digest, children = seen[0], list(seen[1])
        if budget.take_entries(len(children)):
            return digest, children
        self._uncovered.append(place)
        return digest, ()

    def _look_at_tensor(self, place: str, value: Tensor, budget: _Budget) -> tuple[Any, Children]:
        with torch._C.DisableTorchFunctionSubclass():
            held = list(attributes(value))
            if nn.parameter.is_lazy(value):
                return ("not materialized", id(value)), held
            version = None if value.is_inference() else value._version
            # The slot of a leaf only: elsewhere reading it warns.
            gradient = [(".grad", value.grad)] if value.is_leaf else []
            facts = (value.dtype, tuple(value.shape), value.device, value.requires_grad, version)
            nbytes = value._values().nbytes if value.layout == torch.sparse_coo else value.nbytes
            content = content_digest(value) if budget.take_bytes(nbytes) else None
            self._sums += [c for c in (content if type(content) is tuple else (content,)) if type(c) is WordSum]
            if content is None:
                self._uncovered.append(place)
                content = id(value)
            return (*facts, content), [*gradient, *held]

    def _look_at_array(self, place: str, value: Any, budget: _Budget) -> tuple[Any, Children]:
        array = np.ndarray.view(value, np.ndarray)
        covered = budget.take_bytes(array.nbytes)
        if not covered:
            self._uncovered.append(place)
        content = bytes_digest(array) if covered else id(value)
        return (array.dtype, array.shape, content), list(attributes(value))

    def _look_at_container(self, place: str, value: Any, budget: _Budget) -> tuple[Any, Children]:
        kind = type(value)
        keys: list[Any] | None = None
        # By the methods of the built-in type: a subclass may have its own.
        if issubclass(kind, dict):
            pairs = list((OrderedDict if issubclass(kind, OrderedDict) else dict).items(value))
            keys, items = [key for key, _ in pairs], [item for _, item in pairs]
        elif issubclass(kind, np.ndarray):
            items = list(np.ndarray.flatten(value))  # of dtype object
        else:
            base: Any = next(base for base in (list, tuple, deque, set, frozenset) if issubclass(kind, base))
            items = list(base.__iter__(value))
        if not budget.take_entries(len(items)):
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


def _registered(module: nn.Module, place: str = "") -> Iterator[tuple[str, nn.Module]]:
    seen, queue = set(), deque([(place, module)])
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
