"""What the schedulers of a Trainer will have set some steps from now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eos_monitor.forecast.lookahead import Position, Settings, SettingsAhead
from eos_monitor.limits.thresholds import learning_rates
from eos_monitor.readings.guard import Guard

_LOOKING_AHEAD = "looking ahead at what schedulers will set"
_HORIZON = 5  # steps in which a rise of the learning rate is looked for
_ASKED = 8


class TrainerSchedulers:
    """Follows the schedulers that a Trainer steps; under manual optimization the user does, and nothing is known.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        optimizers: Those whose settings are asked for.
        guard: Keeps a scheduler's failure from ending the run.
    """

    def __init__(self, trainer: Any, pl_module: Any, optimizers: Sequence[Any], guard: Guard) -> None:
        self._trainer = trainer
        self._optimizers = optimizers
        self._guard = guard
        self._rates: list[float] = []  # of the present step and of those to come
        self._ahead = (
            SettingsAhead(trainer.lr_scheduler_configs, optimizers)
            if pl_module.automatic_optimization and trainer.lr_scheduler_configs
            else None
        )

    def after(self, steps: int, batch_idx: int) -> Settings | None:
        """Return the settings ``steps`` optimizer steps after the one that micro-batch ``batch_idx`` belongs to.

        None where nothing is scheduled, or it cannot be known. To be asked before the schedulers are stepped.
        """
        ahead = self._ahead
        if ahead is None:
            return None
        position = _position(self._trainer, batch_idx)
        return self._guard.run(_LOOKING_AHEAD, lambda: ahead.after(steps, position), together=True)

    def highest_rate(self, batch_idx: int) -> float | None:
        """Return the highest learning rate of the first group in the next five steps; None if it is not known.

        To be asked once a step: eight are asked for at once, and again after four or when the present one is another.
        """
        ahead = self._ahead
        if ahead is None:
            return None
        now = next(iter(learning_rates(self._optimizers)), None)
        if now is None:
            return None
        if len(self._rates) > _HORIZON + 1 and self._rates[1] == now:
            self._rates.pop(0)
        else:
            position = _position(self._trainer, batch_idx)
            found = self._guard.run(_LOOKING_AHEAD, lambda: ahead.rates(_ASKED, position), together=True)
            self._rates = [now, *(found or ())]
        return max(self._rates[1 : _HORIZON + 1], default=None)


def _position(trainer: Any, batch_idx: int) -> Position:
    return Position(batch_idx, trainer.current_epoch, trainer.num_training_batches, trainer.accumulate_grad_batches)


def steps_ahead(trainer: Any) -> int | None:
    """Return the optimizer steps that the Trainer will take; None if nobody knows."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None
