"""The processes of a data-parallel run, and how they decide alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eos_monitor.curvature.hessian import SumOverRanks


def _same(value: Any) -> Any:
    return value


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Ranks:
    """The processes of a data-parallel run; one process by default.

    Outside of a reading they exchange numbers at the same points of their runs, and :meth:`meet` first. A process that
    cannot go on says so by :meth:`leave`, without waiting for anybody; the others learn it where they meet next, and
    raise :class:`ProcessLeftError` in place of waiting for ever.

    Attributes:
        size: Number of processes.
        sum: Elementwise sum over them of a flat tensor, inside a reading; None for one process.
        from_first: What the first process has, on every one.
        meet: Make sure that all are still there.
        leave: Take no further part.
    """

    size: int = 1
    sum: SumOverRanks | None = None
    from_first: Callable[[Any], Any] = _same
    meet: Callable[[], None] = _nothing
    leave: Callable[[], None] = _nothing

    def met_sum(self, tensor: Tensor) -> Tensor:
        """Return the elementwise sum over all processes, which have to be there."""
        if self.sum is None:
            return tensor
        self.meet()
        return self.sum(tensor)

    def total(self, *values: float) -> list[float]:
        """Return the sums over all processes of some numbers."""
        return [
            float(value) for value in self.met_sum(torch.tensor(values, dtype=torch.float64, device="cpu")).tolist()
        ]
