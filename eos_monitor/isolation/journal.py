"""Long lists that a loss only appends to, such as the losses of all steps so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_LONG = 64  # entries; what is shorter is copied at once
# Of these alone: a parameter is to be replaced, and what holds other objects is to be found.
_PLAIN = frozenset({Tensor, float, int, bool, str, type(None)})


class Journal(list[Any]):
    """A copy of a list whose entries are copied once somebody looks at them; appending and counting do not.

    Args:
        entries: The entries.
        copy: Copies one of them; None if they need not be copied.
    """

    def __init__(self, entries: Iterable[Any] = (), copy: Callable[[Any], Any] | None = None) -> None:
        super().__init__(entries)
        self._copy = copy
        self._count = len(self)

    def fill(self) -> None:
        """Put copies in the place of the entries that were there at first."""
        copy = self._copy
        self._copy = None
        if copy is not None:
            originals = list.__getitem__(self, slice(self._count))
            list.__setitem__(self, slice(self._count), [copy(entry) for entry in originals])

    def entrust(self, copy: Callable[[Any], Any]) -> None:
        """Copy with another function from now on, if anything is left to copy."""
        if self._copy is not None:
            self._copy = copy

    def clear(self) -> None:
        """Remove all entries."""
        self._copy = None
        super().clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.fill()
        return list, (list(self),)

    def __radd__(self, other: list[Any]) -> list[Any]:
        # A list asks no iterator of another one that is added to it.
        self.fill()
        return other + list(self)


def _filling(name: str) -> Callable[..., Any]:
    method = getattr(list, name)

    def call(self: Journal, *args: Any, **settings: Any) -> Any:
        self.fill()
        return method(self, *args, **settings)

    return call


for _name in (
    *("__getitem__", "__setitem__", "__delitem__", "__iter__", "__reversed__", "__contains__", "__repr__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__mul__", "__rmul__", "__imul__"),
    *("copy", "count", "index", "insert", "pop", "remove", "reverse", "sort"),
):
    setattr(Journal, _name, _filling(_name))


def is_long(value: list[Any]) -> bool:
    """Whether a list is worth a journal, and can be one."""
    return len(value) > _LONG and _PLAIN.issuperset(map(type, value))


class FilledFirst(TorchFunctionMode):
    """Mode in which journals are filled before torch looks into them: it asks a list for no iterator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument in (*args, *kwargs.values()):
            if type(argument) is Journal:
                argument.fill()
        return func(*args, **kwargs)
