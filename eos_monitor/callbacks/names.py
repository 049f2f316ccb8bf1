"""Names of the callbacks of one Trainer, no two alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from eos_monitor.callbacks.monitor_settings import check_name


class Named:
    """Base of the callbacks that have a name: in one Trainer each has another one.

    Where several ask for the same, the later ones are numbered: ``eos``, ``eos-2``. That is settled when a run is set
    up, because until then nobody knows of the others.

    Args:
        name: The name that is asked for.

    Attributes:
        name: First part of log keys and file names.

    Raises:
        ValueError: If the name is none.
    """

    _writes = "readings"  # callbacks that write other files may have the same name
    _generate_state_key: Callable[..., str]  # Lightning's

    def __init__(self, name: str) -> None:
        check_name(name)
        self.name = name
        self._asked = name
        self._settled = False

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; none that another one has, from the beginning on."""
        if self._settled:
            return self._generate_state_key(name=self.name)
        return self._generate_state_key(name=self.name, instance=id(self))

    def take_name(self, name: str) -> None:
        """Go by another name."""
        self.name = name
        self._settled = True

    def tell_name(self, say: Callable[[str], None]) -> None:
        """Say so if the name is not the one that was asked for."""
        if self.name != self._asked:
            say(f"another callback is named {self._asked!r}: this one writes as {self.name!r}; `name` names it")


def settle_names(callbacks: Iterable[Any]) -> None:
    """Number the names that several callbacks of a Trainer ask for, in their order."""
    named = [callback for callback in callbacks if isinstance(callback, Named)]
    asked = {(callback._writes, callback._asked) for callback in named}
    taken: set[tuple[str, str]] = set()
    for callback in named:
        number = 1
        name = callback._asked
        while (callback._writes, name) in taken or (number > 1 and (callback._writes, name) in asked):
            number += 1
            name = f"{callback._asked}-{number}"
        taken.add((callback._writes, name))
        callback.take_name(name)
