"""Rules that others use, and some that were tried, in the form of the detector's alarms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from tests.benchmarks.detector_scores import Said, as_said, healthy_steps
from tests.benchmarks.labelled_runs import Run

_HOLD = 50  # steps that an alarm lasts; without it each of many in a row would count
Score = Callable[[Run], np.ndarray]  # a number a step, an alarm above a cut


def loss_z(run: Run) -> np.ndarray:
    """(loss − mean) / sd, both exponentially weighted over 50 steps."""
    return _z(run.loss[: run.steps], 50)


def gradient_z(run: Run) -> np.ndarray:
    """The same of the gradient norm, as ZClip has it."""
    return _z(run.gradient[: run.steps], 50)


def trial_growth(run: Run) -> np.ndarray:
    """ln of the loss at θ + update over the loss at θ, same batch, summed over 8 steps: one forward pass a step."""
    loss = run.loss[: run.steps]
    after = np.r_[loss[1:], np.nan] if run.optimizer.full_batch else run.trial[: run.steps]
    with np.errstate(all="ignore"):
        growth = np.log(after / loss)
    growth = np.nan_to_num(growth, nan=0.0, posinf=100.0, neginf=0.0)
    total = np.cumsum(growth)
    return total - np.r_[np.zeros(8), total[:-8]][: len(total)]


def amplitude_growth(run: Run) -> np.ndarray:
    """e-folds per step of the projections' amplitude over 8 updates, where r > 1 and the loss is above 1.5 × median."""
    moved = np.nan_to_num(run.projection[: run.steps]).astype(float) ** 2
    power = np.convolve(moved, np.ones(4))[: len(moved)] + 1e-300
    # The update of a step is known after it.
    growth = (
        np.r_[np.zeros(9), 0.5 * np.log(power[8:] / power[4:-4]) / 4][: len(moved)] if len(moved) > 9 else 0 * moved
    )
    last = np.searchsorted(run.read_at, np.arange(run.steps), side="right") - 1
    ratio = np.nan_to_num(run.read[last, 0]) * run.lr[: run.steps] / run.lr[run.read_at[last]]
    loss = run.loss[: run.steps]
    level = np.array([np.median(loss[max(0, t - 256) : max(t, 1)]) for t in range(run.steps)])
    return np.where((ratio > 1.0) & (loss > 1.5 * level), growth, 0.0)


def _z(series: np.ndarray, span: int) -> np.ndarray:
    alpha, mean, var, found = 2 / (span + 1), None, 0.0, []
    for x in series.tolist():
        if not np.isfinite(x):
            found.append(np.inf)
            continue
        if mean is None:
            mean, z = x, 0.0
        else:
            z = (x - mean) / np.sqrt(var + 1e-24) if len(found) >= 10 else 0.0
            off = x - mean
            mean += alpha * off
            var = (1 - alpha) * (var + alpha * off * off)
        found.append(z)
    return np.array(found)


def alarms(run: Run, above: np.ndarray) -> Said:
    """Hold every alarm for 50 steps."""
    held = np.convolve(above.astype(float), np.ones(_HOLD))[: len(above)] > 0
    return as_said(run, held.tolist())


def at_cut(score: Score, runs: Sequence[Run], cut: float) -> list[Said]:
    return [alarms(run, score(run) > cut) for run in runs]


def calibrated(score: Score, runs: Sequence[Run], allowed: float) -> float:
    """Return the lowest cut of a grid that gives at most ``allowed`` false alarms per 10⁴ healthy steps."""
    values = [score(run) for run in runs]
    steps = sum(healthy_steps(run) for run in runs)
    for cut in np.geomspace(0.02, 1e5, 60):
        said = [alarms(run, value > cut) for run, value in zip(runs, values, strict=True)]
        if 1e4 * sum(one.false_alarms for one in said) <= allowed * steps:
            return float(cut)
    return float("inf")


def spike_detection(runs: Sequence[Run]) -> list[Said]:
    """Lightning's own class at its defaults; after an alarm it goes on, as the class does when it is caught."""
    from lightning.fabric.utilities.spike import SpikeDetection, TrainingSpikeException

    strategy = SimpleNamespace(
        root_device=torch.device("cpu"),
        barrier=lambda: None,
        reduce_boolean_decision=lambda decision, all=False: decision,
    )
    # The rank of a process that writes no file of bad batches.
    fabric, found = SimpleNamespace(strategy=strategy, global_rank=1), []
    for run in runs:
        detector, above = SpikeDetection(exclude_batches_path="unused.json"), []
        for step, loss in enumerate(run.loss[: run.steps].tolist()):
            try:
                detector.on_train_batch_end(fabric, torch.tensor(loss), None, step)  # type: ignore[arg-type]
                above.append(False)
            except TrainingSpikeException:
                above.append(True)
        found.append(alarms(run, np.array(above)))
    return found


def cusum(runs: Sequence[Run]) -> list[Said] | None:
    """trainscope's change-point detector at its defaults, upward alarms only; None if it is not installed."""
    try:
        from trainscope.core.detectors.changepoint import ChangePointDetector
    except ImportError:
        return None
    found = []
    for run in runs:
        detector, above = ChangePointDetector(), []
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            for loss in run.loss[: run.steps].tolist():
                score = detector.update(loss) if np.isfinite(loss) else np.inf
                above.append(score is not None and score > 0)
        found.append(alarms(run, np.array(above)))
    return found
