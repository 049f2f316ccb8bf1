"""Optimizers whose settings are checked group by group."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim import Optimizer


class CheckedOptimizer(Optimizer):
    """Base of optimizers that no group with a setting out of range gets into."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose settings are checked.

        Raises:
            ValueError: If a setting is out of its range, or the parameters are not of a kind that it takes.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Raise a ValueError if a setting of ``group`` is out of its range."""


class GroupwiseOptimizer(CheckedOptimizer):
    """Base of optimizers whose step takes the gradients that are there, one group after the other."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Computes the loss and its gradients once more; called once, and its loss returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step(group)
        return loss

    @abstractmethod
    def _step(self, group: dict[str, Any]) -> None:
        """Move the parameters of a group."""
