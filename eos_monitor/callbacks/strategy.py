"""A Trainer's processes: whether they can be measured, and how they speak to one another."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from eos_monitor.monitor.ranks import Ranks
from eos_monitor.readings.guard import ProcessLeftError


def unsupported(trainer: Any) -> str | None:
    """Say why this Trainer cannot be measured; None if it can."""
    if trainer.barebones:
        return "It does not measure with Trainer(barebones=True)."
    strategies = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    # DeepSpeed's strategy derives from DDP's and shards all the same.
    if trainer.world_size > 1 and ("DDPStrategy" not in strategies or "DeepSpeedStrategy" in strategies):
        return f"It measures on one process or with DDP, not with {strategies[0]}."
    if any(hasattr(p, "device_mesh") for p in trainer.lightning_module.parameters()):
        return "It does not measure sharded parameters (DTensor)."
    return None


def ranks_of(trainer: Any) -> Ranks:
    """Return the Trainer's processes, for sums and decisions; to be called on all of them."""
    if trainer.world_size == 1:
        return Ranks()
    strategy = trainer.strategy
    device = trainer.lightning_module.device
    attendance = _Attendance()

    def total(tensor: Tensor) -> Tensor:
        summed: Tensor = strategy.reduce(tensor.detach().clone().to(device), reduce_op="sum")
        return summed.to(tensor.device)

    def from_first(value: Any) -> Any:
        attendance.meet()
        return strategy.broadcast(value, src=0)

    return Ranks(trainer.world_size, total, from_first, attendance.meet, attendance.leave)


class _Attendance:
    """Says before each meeting whether all processes come to it.

    A flag is summed over a group of its own: a process that has left has put its flag there already, and goes on with
    training, whose collective calls are in another group and so never meet it.
    """

    def __init__(self) -> None:
        self._group = torch.distributed.new_group(backend="gloo")
        self._farewell: tuple[Tensor, Any] | None = None  # kept until it has arrived

    def leave(self) -> None:
        if self._farewell is None:
            flag = torch.ones(1, device="cpu")
            self._farewell = (flag, torch.distributed.all_reduce(flag, group=self._group, async_op=True))

    def meet(self) -> None:
        if self._farewell is not None:
            raise ProcessLeftError("Expected a process that takes part, got one that has left.")
        flag = torch.zeros(1, device="cpu")
        torch.distributed.all_reduce(flag, group=self._group)
        if float(flag) > 0.0:
            # All who came know it now, and none of them comes again.
            self._farewell = (flag, None)
            raise ProcessLeftError("Expected every process to take part, got one that has left.")
