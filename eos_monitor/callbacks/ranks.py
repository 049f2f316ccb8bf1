"""The processes of a Trainer: whether they can be measured, and how they speak to one another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eos_monitor.monitor.engine import Ranks


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
    """Return the Trainer's processes, for sums and decisions."""
    strategy, device = trainer.strategy, trainer.lightning_module.device

    def total(tensor: Tensor) -> Tensor:
        summed: Tensor = strategy.reduce(tensor.detach().clone().to(device), reduce_op="sum")
        return summed.to(tensor.device)

    return Ranks(trainer.world_size, total, lambda value: strategy.broadcast(value, src=0))
