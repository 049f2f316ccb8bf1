"""The micro-batches of one optimizer step, and the number that it goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class StepWindow:
    """The micro-batches of one optimizer step, up to the first of the next."""

    step: int
    batch_idx: int = 0
    update_begun: bool = False
    batch_ended: bool = False


def step_of(trainer: Any) -> int:
    """Return the step that Lightning logs under: optimizer-step windows since the start."""
    step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if step is None else step)
