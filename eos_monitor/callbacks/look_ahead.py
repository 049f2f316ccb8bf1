"""What a Trainer's schedulers will have set some steps from now."""

from __future__ import annotations

from typing import Any

from eos_monitor.stability.attempts import Attempts
from eos_monitor.stability.lookahead import Position, Settings, SettingsAhead


class LookAhead:
    """Follows the schedulers that a Trainer steps; under manual optimization the user does, and nothing is known.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
    """

    def __init__(self, trainer: Any, pl_module: Any) -> None:
        self._trainer = trainer
        self._attempts = Attempts("looking ahead at what schedulers will set")
        self._ahead = (
            SettingsAhead(trainer.lr_scheduler_configs, trainer.optimizers)
            if pl_module.automatic_optimization and trainer.lr_scheduler_configs
            else None
        )

    def after(self, steps: int, batch_idx: int) -> Settings | None:
        """Return the settings ``steps`` optimizer steps after the one that micro-batch ``batch_idx`` belongs to.

        None where nothing is scheduled, or it cannot be known. To be asked before the schedulers are stepped.
        """
        ahead, trainer = self._ahead, self._trainer
        if ahead is None or self._attempts.off is not None:
            return None
        position = Position(
            batch_idx, trainer.current_epoch, trainer.num_training_batches, trainer.accumulate_grad_batches
        )
        return self._attempts.run(lambda: ahead.after(steps, position))
