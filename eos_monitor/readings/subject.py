"""What a reading is taken of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from eos_monitor.curvature.finite_differences import FiniteDifferenceStep
from eos_monitor.curvature.hessian import HessianOperator, SumOverRanks
from eos_monitor.isolation.sandbox import LossFn, Sandbox
from eos_monitor.limits.thresholds import CriticalCurvature, critical_curvature
from eos_monitor.readings.guard import everywhere


@dataclass(frozen=True)
class Subject:
    """A module with its loss, its probe and its optimizers.

    Attributes:
        module: Module to measure, in its present train or eval mode.
        loss_fn: Its mean loss over a batch.
        batches: The probe.
        optimizers: The optimizers in use.
        batch_size_fn: Samples in a batch; by default the first dimension of its first tensor.
        sandbox: Sandbox to run in, when the module needs a special one.
        sum_over_ranks: Sum over the processes of a data-parallel run; None for one process.
        others: Training batches beside the probe, for what needs no solve.
    """

    module: nn.Module
    loss_fn: LossFn
    batches: Sequence[Any]
    optimizers: Sequence[Optimizer]
    batch_size_fn: Callable[[Any], int] | None = None
    sandbox: Sandbox | None = None
    sum_over_ranks: SumOverRanks | None = None
    others: Iterable[Any] = ()

    def prepare(self, method: str, step: FiniteDifferenceStep | None) -> tuple[CriticalCurvature, HessianOperator]:
        """Return the optimizers' critical curvature, and the Hessian; on every process or on none.

        Args:
            method: How products are computed.
            step: Of an earlier reading, for finite differences.
        """

        def here() -> tuple[CriticalCurvature, HessianOperator]:
            curvature = critical_curvature(self.optimizers)
            return curvature, HessianOperator(
                self.module,
                self.loss_fn,
                self.batches,
                params=curvature.params,
                method=method,
                batch_size_fn=self.batch_size_fn,
                sandbox=self.sandbox,
                sum_over_ranks=self.sum_over_ranks,
                step=step,
                complete=True,
            )

        return everywhere(here, self.sum_over_ranks, "a probe")

    def over_ranks(self, samples: int) -> int:
        """Return the samples of all processes."""
        if self.sum_over_ranks is None:
            return samples
        return int(self.sum_over_ranks(torch.tensor([float(samples)], device="cpu")))
