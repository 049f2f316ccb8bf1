"""States of a run from before, kept in memory to go back to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CLEAR = 16  # steps before the losses leave their bounds in which an instability has been growing


@dataclass(frozen=True)
class Snapshot:
    """A state of module and optimizers, on the CPU, before a step.

    Attributes:
        step: Optimizer step that it precedes.
        beside: What else belongs to it.
    """

    step: int
    tensors: list[Tensor]  # parameters and buffers
    optimizers: list[dict[str, Any]]
    beside: Any

    @staticmethod
    def of(step: int, module: nn.Module, optimizers: Sequence[Any], beside: Any) -> Snapshot:
        """Copy the present state."""
        return Snapshot(
            step,
            [_copied(tensor) for tensor in _tensors(module)],
            [_copied(optimizer.state_dict()) for optimizer in optimizers],
            beside,
        )

    def restore(self, module: nn.Module, optimizers: Sequence[Any]) -> None:
        """Put weights, buffers and the optimizers' state back; their settings, which schedulers made, stay."""
        with torch.no_grad():
            for tensor, before in zip(_tensors(module), self.tensors, strict=True):
                tensor.copy_(before)
        for optimizer, state in zip(optimizers, self.optimizers, strict=True):
            groups = optimizer.param_groups
            present = optimizer.state_dict()
            optimizer.load_state_dict(_copied(state) | {"param_groups": present["param_groups"]})
            optimizer.param_groups = groups  # those that everybody else holds on to


class Snapshots:
    """The last few, one every so many steps.

    Args:
        every: Steps between them, ≥ 1.
        late: Steps by which losses are known too late.

    Raises:
        ValueError: If ``every`` is out of range.
    """

    def __init__(self, every: int, late: int = 0) -> None:
        if every < 1:
            raise ValueError(f"Expected at least 1 step between snapshots, got {every}.")
        self._every = every
        # The newest may be too close to the failure, and those that came too late are of no use.
        self._most = 2 + -(-(late + _CLEAR) // every)
        self._kept: list[Snapshot] = []

    def due(self, step: int) -> bool:
        """Whether the next one is to be taken before ``step``."""
        return not self._kept or step - self._kept[-1].step >= self._every

    def keep(self, snapshot: Snapshot) -> None:
        """Keep one more, and only as many as are needed."""
        self._kept = [*self._kept, snapshot][-self._most :]

    def before(self, step: int) -> Snapshot | None:
        """Return the last one from well before ``step``, or the oldest from before it; later ones are dropped."""
        earlier = [snapshot for snapshot in self._kept if snapshot.step <= step]
        clear = [snapshot for snapshot in earlier if snapshot.step <= step - _CLEAR]
        self._kept = clear or earlier[:1]
        return self._kept[-1] if self._kept else None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)
