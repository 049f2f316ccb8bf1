"""Learning rates that are multiplied while an optimizer updates, and at no other time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from eos_monitor.forecast.lr_governor import Place
from eos_monitor.limits.thresholds import has_learning_rate


def places_of(optimizers: Sequence[Any]) -> tuple[Place, ...]:
    """Return the places of the groups that have a learning rate, in order."""
    return tuple(
        (o, g)
        for o, optimizer in enumerate(optimizers)
        for g, group in enumerate(optimizer.param_groups)
        if has_learning_rate(group)
    )


class RateFactors:
    """Multiplies the learning rates of optimizers inside their ``step`` only.

    Schedulers, checkpoints and loggers run between steps and find what they would find anyhow, so that nothing has to
    be rewritten to make a factor last, and nothing is left to be undone.

    Attributes:
        missed: Whether a step was taken at other learning rates, because nothing had said that it comes.
    """

    def __init__(self) -> None:
        self.missed = False
        self._factors: tuple[float, ...] = ()
        self._by_place: dict[Place, float] = {}
        self._optimizers: list[Any] = []
        self._handles: list[Any] = []
        self._inside: set[int] = set()  # optimizers whose step is under way
        self._due: set[int] = set()  # and those whose step is to come
        self._kept: dict[int, list[tuple[dict[str, Any], Any]]] = {}  # optimizer -> its groups and their own rates

    @property
    def factors(self) -> tuple[float, ...]:
        """One for each group that has a learning rate now, in ``param_groups`` order; empty for none."""
        return self._factors

    @factors.setter
    def factors(self, factors: Sequence[float]) -> None:
        self._factors = tuple(factors)
        # By place: a group that is added to one optimizer moves those of the next ones on.
        self._by_place = dict(zip(places_of(self._optimizers), self._factors, strict=False))

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
        self._due = set()

    def now(self, optimizer: Any) -> None:
        """Take in that an update comes next: its factors are known.

        Without a loss scaler the step is under way already, with the backward pass inside it; with one it comes later,
        or not at all.
        """
        if id(optimizer) in self._inside:
            self._multiply(optimizer)
        else:
            self._due.add(id(optimizer))

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
        return [
            [
                group | {"lr": group["lr"] * self._by_place.get((o, g), 1.0)} if has_learning_rate(group) else group
                for g, group in enumerate(groups)
            ]
            for o, groups in enumerate(settings)
        ]

    def _moves(self) -> bool:
        return any(factor != 1.0 for factor in self._by_place.values())

    def _enter(self, optimizer: Any, *args: Any) -> None:
        self._inside.add(id(optimizer))
        if id(optimizer) in self._due:
            self._due.discard(id(optimizer))
            self._multiply(optimizer)

    def _leave(self, optimizer: Any, *args: Any) -> None:
        self._inside.discard(id(optimizer))
        self.missed |= self._moves() and id(optimizer) not in self._kept
        self._put_back(optimizer)

    def _multiply(self, optimizer: Any) -> None:
        if id(optimizer) in self._kept or not self._moves():
            return
        o = next(i for i, other in enumerate(self._optimizers) if other is optimizer)
        kept = []
        for g, group in enumerate(optimizer.param_groups):
            if has_learning_rate(group):
                kept.append((group, group["lr"]))
                group["lr"] = group["lr"] * self._by_place.get((o, g), 1.0)
        self._kept[id(optimizer)] = kept

    def _put_back(self, optimizer: Any) -> None:
        for group, rate in self._kept.pop(id(optimizer), ()):
            group["lr"] = rate
