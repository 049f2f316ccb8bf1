"""Learning rates that are multiplied while an optimizer updates, and at no other time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class RateFactors:
    """Multiplies the learning rates of optimizers inside their ``step`` only.

    Schedulers, checkpoints and loggers run between steps and find what they would find anyhow, so that nothing has to
    be rewritten to make a factor last, and nothing is left to be undone.

    Attributes:
        factors: One for each group that has a learning rate, in ``param_groups`` order; empty for none.
    """

    def __init__(self) -> None:
        self.factors: tuple[float, ...] = ()
        self._optimizers: list[Any] = []
        self._handles: list[Any] = []
        self._inside: set[int] = set()  # optimizers whose step is under way
        self._kept: dict[int, list[tuple[dict[str, Any], Any]]] = {}  # optimizer -> its groups and their own rates

    def attach(self, optimizers: Sequence[Any]) -> None:
        """Follow the steps of ``optimizers``; raises AttributeError where one has no step hooks."""
        self.detach()
        self._optimizers = list(optimizers)
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._enter))
            self._handles.append(optimizer.register_step_post_hook(self._leave))

    def detach(self) -> None:
        """Put every learning rate back and follow no more."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self._optimizers:
            self._put_back(optimizer)
        self._handles = []
        self._optimizers = []
        self._inside = set()

    def now(self, optimizer: Any) -> None:
        """Take in that an update comes next: its factors are known.

        Without a loss scaler the step is under way already, with the backward pass inside it; with one it comes later.
        """
        if id(optimizer) in self._inside:
            self._multiply(optimizer)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Show all groups with the learning rates that the update uses."""
        fresh = [optimizer for optimizer in self._optimizers if id(optimizer) not in self._kept]
        for optimizer in fresh:
            self._multiply(optimizer)
        try:
            yield
        finally:
            for optimizer in fresh:
                self._put_back(optimizer)

    def scaled(self, settings: list[list[dict[str, Any]]] | None) -> list[list[dict[str, Any]]] | None:
        """Return settings of a step to come with their learning rates multiplied."""
        if settings is None or not self._moves():
            return settings
        factors = iter(self.factors)
        return [
            [group | {"lr": group["lr"] * next(factors)} if "lr" in group else group for group in groups]
            for groups in settings
        ]

    def _moves(self) -> bool:
        return any(factor != 1.0 for factor in self.factors)

    def _enter(self, optimizer: Any, *args: Any) -> None:
        self._inside.add(id(optimizer))

    def _leave(self, optimizer: Any, *args: Any) -> None:
        self._inside.discard(id(optimizer))
        self._put_back(optimizer)

    def _multiply(self, optimizer: Any) -> None:
        if id(optimizer) in self._kept or not self._moves():
            return
        place = 0
        for other in self._optimizers:
            groups = [group for group in other.param_groups if "lr" in group]
            if other is optimizer:
                kept = [(group, group["lr"]) for group in groups]
                self._kept[id(optimizer)] = kept
                for (group, rate), factor in zip(kept, self.factors[place:], strict=False):
                    group["lr"] = rate * factor
            place += len(groups)

    def _put_back(self, optimizer: Any) -> None:
        for group, rate in self._kept.pop(id(optimizer), ()):
            group["lr"] = rate
