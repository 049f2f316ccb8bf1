"""What an object refers to, read without running any code of its own.

Each reader returns a digest of the object without its referents, and the referents.
"""

from __future__ import annotations

import enum
import functools
import gc
import io
import itertools
import sys
import types
from collections.abc import Iterable
from typing import Any

from torch import Generator, nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from eos_monitor.isolation.digests import scalar_digest

Referents = Iterable[tuple[str, Any]]  # (what to append to the place, value)

_POSITIONS = (io.BytesIO, io.StringIO, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO)
# The registries of a module, whose entries go by their own names.
_REGISTRIES = ("_parameters", "_buffers", "_modules")
# Loggers and the machinery around a run: not the user's state, and some of it moves by itself, in other threads.
_MACHINERY = (
    *("lightning", "pytorch_lightning", "lightning_fabric", "eos_monitor", "logging", "threading", "multiprocessing"),
    *("concurrent", "asyncio", "wandb", "mlflow", "comet_ml", "neptune", "tensorboard", "tensorboardX"),
    *("pathlib", "re", "datetime", "weakref"),  # values, some of which cache what was asked of them
)
_TORCH_MACHINERY = ("torch._", "torch.cuda", "torch.distributed", "torch.fx", "torch.jit", "torch.profiler")
# Functions and classes of these hold nothing of a run.
_LIBRARIES = frozenset({*sys.stdlib_module_names, *_MACHINERY, "numpy", "scipy", "torch", "torchmetrics"})


def is_library(value: type | types.FunctionType) -> bool:
    """Whether a class or function comes with the tools rather than with the run."""
    return _package(value) in _LIBRARIES


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None)).partition(".")[0]


@functools.cache
def is_machinery(kind: Any) -> bool:
    """Whether instances of a class are left out."""
    if issubclass(kind, (types.ModuleType, enum.Enum, DataLoader)):
        return True
    if any(_package(cls) in _MACHINERY for cls in kind.__mro__):
        return True
    return str(kind.__module__).startswith(_TORCH_MACHINERY) and not issubclass(kind, Generator)


def attributes(value: Any) -> Referents:
    """Return what instances hold in their ``__dict__`` and slots, read without asking the instance."""
    found: dict[str, Any] = {}
    for cls in type(value).__mro__:
        members = type.__dict__["__dict__"].__get__(cls)
        namespace = members.get("__dict__")
        if type(namespace) in (types.GetSetDescriptorType, types.MemberDescriptorType):
            found = {**found, **(namespace.__get__(value) or {})}
        for name, member in members.items():
            if type(member) is types.MemberDescriptorType and not name.startswith("__"):
                try:
                    found[name] = member.__get__(value)
                except AttributeError:
                    continue  # a slot that was never filled
    return [(f".{name}", item) for name, item in found.items()]


def read_object(value: Any) -> tuple[Any, Referents]:
    """Read an object that nothing is known of."""
    held = list(attributes(value))
    return (type(value), id(value), frozenset(name for name, _ in held)), held


def read_module(module: nn.Module) -> tuple[Any, Referents]:
    """Read a module; the entries of its registries go by their own names."""
    namespace = nn.Module.__dict__["__dict__"].__get__(module)
    entries = {name: value for name, value in namespace.items() if name not in _REGISTRIES}
    for registry in _REGISTRIES:
        entries.update(namespace.get(registry) or {})
    return (type(module), id(module), frozenset(entries)), [(f".{name}", value) for name, value in entries.items()]


def held_by(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Return what a function holds: its attributes, what it closes over, and its defaults."""
    found: list[tuple[str, Any]] = [(f".{name}", value) for name, value in vars(function).items()]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((f".{name}", cell.cell_contents))
        except ValueError:
            continue  # not assigned yet
    defaults = [*enumerate(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    return [*found, *((f".default[{name}]", value) for name, value in defaults)]


def read_special(value: Any) -> tuple[Any, Referents] | None:
    """Read a function, method, iterator or file; None for other objects."""
    kind = type(value)
    if kind is types.FunctionType:
        return ("function", id(value)), [] if is_library(value) else held_by(value)
    if kind is types.MethodType:
        return ("method", id(value.__func__)), [(".__self__", value.__self__), (".__func__", value.__func__)]
    if kind is types.BuiltinMethodType:
        return ("method", value.__name__), [(".__self__", value.__self__)]
    if kind is functools._lru_cache_wrapper:
        return ("cache", id(value)), []  # filled by a reading it gives the same answers
    if kind is types.GeneratorType:
        frame = value.gi_frame
        local = dict(frame.f_locals) if frame is not None else {}
        digest = ("generator", id(value), frame.f_lasti if frame is not None else None, frozenset(local))
        return digest, [(f".{name.lstrip('.')}", item) for name, item in local.items()]
    if issubclass(kind, _BaseDataLoaderIter):
        return ("batches", id(value), vars(value).get("_num_yielded")), []  # the rest moves in other threads
    if kind in _POSITIONS:
        return ("file", id(value), None if value.closed or not value.seekable() else value.tell()), []
    if kind.__module__ in ("builtins", "itertools", "collections", "_collections") and hasattr(kind, "__next__"):
        return _iterator(value)
    return None


def _iterator(value: Any) -> tuple[Any, Referents]:
    """Read the position of a built-in iterator from what it would be pickled as."""
    kind: Any = type(value)
    try:
        pieces: tuple[Any, ...] = kind.__reduce__(value)[1:]
        parts = [part for piece in pieces for part in (piece if type(piece) is tuple else (piece,))]
        position = [scalar_digest(part) for part in parts]
    except (TypeError, AttributeError):  # gone from itertools in Python 3.14
        parts = gc.get_referents(value)
        position = [repr(value)] if kind is itertools.count else []
    return (kind, id(value), position), [(f"[{i}]", part) for i, part in enumerate(parts)]
