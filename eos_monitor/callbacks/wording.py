"""A reading, its optimizers and its cadence in words and in log keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eos_monitor.limits.thresholds import has_learning_rate, learning_rates
from eos_monitor.monitor.engine import Engine
from eos_monitor.readings.reading import StabilityReading

# Row keys that every logger gets, in this order.
_SCALARS = (
    "sharpness",
    "normalized_sharpness",
    "threshold",
    "edge_ratio",
    "error",
    "edge_scale",
    "edge_ratio_clipped",
    "edge_ratio_next",
    "batch_sharpness",
    "directional_ratio",
    "matvecs",
    "overhead",
)


def edge_metrics(name: str, row: Mapping[str, Any], verdict: int, group_names: Sequence[str]) -> dict[str, float]:
    """Return what loggers get of one reading."""
    metrics: dict[str, float] = {f"{name}/{key}": row[key] for key in _SCALARS if row.get(key) is not None}
    metrics[f"{name}/verdict"] = verdict
    rates = row["edge_lr"] or ()
    for group, rate in zip(group_names, rates, strict=False):
        metrics[f"{name}/edge_lr" + (f"/{group}" if len(rates) > 1 else "")] = rate
    return metrics


def group_names(optimizers: Sequence[Any]) -> list[str]:
    """Name the groups that have a learning rate as LearningRateMonitor does for optimizers without named schedulers."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        count = seen.get(kind, 0)
        seen[kind] = count + 1
        base = f"lr-{kind}" + (f"-{count}" if count else "")
        groups = optimizer.param_groups
        names += [
            base if len(groups) == 1 else f"{base}/{group.get('name', f'pg{i + 1}')}"
            for i, group in enumerate(groups)
            if has_learning_rate(group)
        ]
    return names


def describe_optimizers(optimizers: Sequence[Any], readings: Sequence[StabilityReading]) -> str:
    """Return the optimizers in words, with the learning rates that readings were taken at, or those from and to."""
    parts = []
    stop = 0
    for optimizer in optimizers:
        start = stop
        stop += len(learning_rates([optimizer]))
        groups = list(zip(*(reading.lr[start:stop] for reading in readings if len(reading.lr) >= stop), strict=True))
        rates = dict.fromkeys(_from_to(values) for values in groups)
        parts.append(f"{type(optimizer).__name__}, lr {', '.join(rates) or 'of its own'}")
    return " and ".join(parts)


def _from_to(values: Sequence[float]) -> str:
    low = f"{min(values):.3g}"
    high = f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def describe_threshold(reading: StabilityReading) -> str:
    """Return the threshold of a reading in words."""
    if reading.threshold is not None:
        return f"threshold {reading.threshold:.4g}"
    if reading.edge_ratio is not None:
        return "different thresholds in different groups"
    return "no threshold: " + ("; ".join(reading.notes) or "unknown")


def describe_stale(reading: StabilityReading, optimizers: Sequence[Any]) -> str:
    """Return why a reading is not one of its step's settings, in words.

    Args:
        reading: As it was measured.
        optimizers: With the settings of the step.
    """
    now = learning_rates(optimizers)

    def told(rates: Sequence[float]) -> str:
        return ", ".join(f"{rate:.3g}" for rate in rates) or "none"

    moved = (
        f"the learning rates went from {told(reading.lr)} to {told(now)}, not by one common factor"
        if now != reading.lr
        else "the optimizers' settings changed (momentum, betas, weight decay, parameters)"
    )
    return f"stale: after it was measured and before the step {moved}; set before the batch, it is measured"


def describe_start(engine: Engine, reading: StabilityReading, loss: str) -> str:
    """Return what is measured, on what, and how often, in words.

    Args:
        engine: Has taken the first reading.
        reading: The reading.
        loss: Where the loss comes from.
    """
    schedule = engine.schedule
    if schedule.every_n_steps is not None:
        cadence = f"one every {schedule.every_n_steps} steps"
    else:
        seconds = schedule.predicted_cost / schedule.max_overhead
        cadence = f"one about every {seconds:.2g} s of training ({schedule.max_overhead:.0%} of the time)"
    processes = f" of each of {engine.ranks.size} processes" if engine.ranks.size > 1 else ""
    return (
        f"{describe_threshold(reading)}; loss from {loss}; probe: {engine.samples.describe()}{processes}; first "
        f"reading {reading.seconds:.2g} s ({reading.matvecs} products), then {cadence}; start-up "
        f"{schedule.startup:.2g} s"
    )
