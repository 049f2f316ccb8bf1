"""Optimizers whose settings are checked group by group."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

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
