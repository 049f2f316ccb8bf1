"""What there is to measure beside a reading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eos_monitor.callbacks.trainer_sandbox import TrainerSandbox
from eos_monitor.forecast.lookahead import Settings
from eos_monitor.isolation.sandbox import LossFn
from eos_monitor.readings.reading import Measurement
from eos_monitor.verdicts.detector import Verdict


@dataclass(frozen=True)
class ReadingContext:
    """What there is to measure on.

    Attributes:
        trainer: The Trainer.
        pl_module: Its module.
        loss_fn: The loss that the monitor measures.
        optimizers: The optimizers whose parameters it is measured over.
        batches: The monitor's probe, on the module's device.
        step: Optimizer step that the reading precedes.
        measurement: The monitor's reading.
        modes: Critical modes of it, ``(n, k)``.
        verdict: The monitor's, as of the step before.
        ahead: n -> what the schedulers will have set n steps from the one to come; None where that is not known.
    """

    trainer: Any
    pl_module: Any
    loss_fn: LossFn
    optimizers: Sequence[Any]
    batches: list[Any]
    step: int
    measurement: Measurement
    modes: Tensor | None
    verdict: Verdict
    ahead: Callable[[int], Settings | None]

    def sandbox(self) -> TrainerSandbox:
        """Return a sandbox for the module, in which the first process measures alone."""
        return TrainerSandbox(self.trainer, self.pl_module, alone=True)
