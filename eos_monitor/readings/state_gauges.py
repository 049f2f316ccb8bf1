"""What a reading has beside the edge ratio: gauges of the present state, without an eigen-solve."""

from __future__ import annotations

import math
from dataclasses import replace

from eos_monitor.curvature.batch_sharpness import batch_sharpness
from eos_monitor.curvature.directional import directional_ratio
from eos_monitor.isolation.parted_loss import PartedLoss
from eos_monitor.isolation.twin import trained_parameters
from eos_monitor.limits.plateau import batch_sharpness_limits
from eos_monitor.readings.reading import StabilityReading
from eos_monitor.readings.subject import Subject


def with_state_gauges(
    reading: StabilityReading, subject: Subject, *, without_threshold: bool, accumulate: int | None
) -> StabilityReading:
    """Add batch sharpness, where its line is known, and the directional ratio, where some group has no threshold.

    The batch sharpness is that of the probe's batches, which are training batches, and of the others. A gauge that
    fails leaves a note.

    Args:
        reading: Reading to add to.
        subject: What it was taken of.
        without_threshold: Whether some group has no threshold.
        accumulate: Batches that make one optimizer step; None if the probe's are not the batches of training.
    """
    # Of several losses there is no one gradient, and no one line.
    parted = isinstance(subject.loss_fn, PartedLoss)
    limits = None if parted else batch_sharpness_limits(subject.optimizers)
    if limits is not None and accumulate is not None and not reading.full_batch:
        reading = _with_batch_sharpness(reading, subject, limits, accumulate)
    return _with_directional_ratio(reading, subject) if without_threshold else reading


def _with_batch_sharpness(
    reading: StabilityReading, subject: Subject, limits: tuple[float, float], accumulate: int
) -> StabilityReading:
    try:
        found = batch_sharpness(
            subject.module,
            subject.loss_fn,
            [*subject.batches, *subject.others],
            params=trained_parameters(subject.optimizers),
            rtol=0.0,  # they are what there is
            accumulate=accumulate,
            method=reading.method,
            sandbox=subject.sandbox,
            sum_over_ranks=subject.sum_over_ranks,
        )
    except ValueError as error:  # the probe is shorter than one step's batches
        return _with_note(reading, f"no batch sharpness: {error}")
    return replace(
        reading, batch_sharpness=found.value, batch_sharpness_error=found.error, batch_sharpness_limits=limits
    )


def _with_directional_ratio(reading: StabilityReading, subject: Subject) -> StabilityReading:
    try:
        ratio = directional_ratio(
            subject.module,
            subject.loss_fn,
            subject.batches,
            subject.optimizers,
            method="forward" if reading.method == "fd" else "product",
            batch_size_fn=subject.batch_size_fn,
            sandbox=subject.sandbox,
            sum_over_ranks=subject.sum_over_ranks,
        )
    except ValueError as error:  # a step that needs a closure
        return _with_note(reading, f"no directional ratio: {error}")
    return replace(reading, directional_ratio=ratio if ratio is not None and math.isfinite(ratio) else None)


def _with_note(reading: StabilityReading, note: str) -> StabilityReading:
    return replace(reading, notes=(*reading.notes, note))
