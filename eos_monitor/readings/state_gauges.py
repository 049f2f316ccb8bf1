"""What a reading has beside the edge ratio: gauges of the present state, without an eigen-solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from eos_monitor.curvature.batch_sharpness import batch_sharpness
from eos_monitor.curvature.directional import directional_ratio
from eos_monitor.curvature.hessian import SumOverRanks
from eos_monitor.isolation.sandbox import LossFn, Sandbox
from eos_monitor.isolation.twin import trained_parameters
from eos_monitor.limits.plateau import batch_sharpness_limits
from eos_monitor.readings.reading import StabilityReading


def with_state_gauges(
    reading: StabilityReading,
    module: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    optimizers: Sequence[Optimizer],
    *,
    without_threshold: bool,
    accumulate: int | None,
    method: str,
    batch_size_fn: Callable[[Any], int] | None = None,
    sandbox: Sandbox | None = None,
    sum_over_ranks: SumOverRanks | None = None,
) -> StabilityReading:
    """Add batch sharpness, where its line is known, and the directional ratio, where some group has no threshold.

    The batch sharpness is that of the probe's batches, which are training batches. A gauge that fails leaves a note.

    Args:
        reading: Reading to add to.
        module: Module that was measured.
        loss_fn: Its loss.
        batches: The probe.
        optimizers: The optimizers in use.
        without_threshold: Whether some group has no threshold.
        accumulate: Batches that make one optimizer step; None if the probe's are not the batches of training.
        method: How products are computed.
        batch_size_fn: Samples in a batch.
        sandbox: Sandbox to run in.
        sum_over_ranks: Sum over the processes of a data-parallel run.
    """
    limits = batch_sharpness_limits(optimizers)
    if limits is not None and accumulate is not None and not reading.full_batch:
        try:
            found = batch_sharpness(
                module,
                loss_fn,
                batches,
                params=trained_parameters(optimizers),
                rtol=0.0,  # the probe is what there is
                accumulate=accumulate,
                method=method,
                sandbox=sandbox,
                sum_over_ranks=sum_over_ranks,
            )
        except ValueError as error:  # the probe is shorter than one step's batches
            reading = _noted(reading, f"no batch sharpness: {error}")
        else:
            reading = replace(
                reading,
                batch_sharpness=found.value,
                batch_sharpness_error=found.error,
                batch_sharpness_limits=limits,
            )
    if without_threshold:
        try:
            ratio = directional_ratio(
                module,
                loss_fn,
                batches,
                optimizers,
                method="forward" if method == "fd" else "product",
                batch_size_fn=batch_size_fn,
                sandbox=sandbox,
                sum_over_ranks=sum_over_ranks,
            )
        except ValueError as error:  # a step that needs a closure
            reading = _noted(reading, f"no directional ratio: {error}")
        else:
            finite = ratio is not None and math.isfinite(ratio)
            reading = replace(reading, directional_ratio=ratio if finite else None)
    return reading


def _noted(reading: StabilityReading, note: str) -> StabilityReading:
    return replace(reading, notes=(*reading.notes, note))
