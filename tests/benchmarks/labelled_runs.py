"""Labelled runs: some calm, many at the edge and bounded, some lost on purpose; recorded once, replayed by any rule.

Labels come from what became of the loss, and from edge ratios of all data that no detector sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.detector_nets import NETS, SMALL, Net
from tests.benchmarks.detector_simulation import OPTIMIZERS, Optimizer, Plan, Simulation

_MANY = ("stable", "decay", "edge", "edge", "edge", "hover", "hover", "too large", "ramp", "fast warm-up") + (
    "slow warm-up", "jump", "jump", "jump", "jump", "bad batch", "noise", "shift", "drop",
)  # fmt: skip
SCENARIOS = tuple(dict.fromkeys(_MANY))
_RARE = ("stable", "noise", "bad batch", "drop", "shift", "decay", "too large")
# Where base learning rates put the edge ratio. With small batches momentum fails far below 1 already.
_PEAK, _PEAK_OF_NOISY_MOMENTUM = 0.25, 0.08
_LOOK_BACK, _ABOVE, _STAYS, _OF = 256, 3.0, 0.9, 50


@dataclass(frozen=True)
class Shard:
    """The runs of one net under one optimizer, trained together."""

    net: str
    optimizer: str
    steps: int
    scenarios: tuple[str, ...]


def shards(*, reduced: bool = False) -> list[Shard]:
    """The whole suite, or a slice of it that takes a minute or two."""
    found = []
    for o, optimizer in enumerate(OPTIMIZERS):
        for n, name in enumerate(NETS):
            net, rare = NETS[name], tuple(_RARE[(n + o + i) % len(_RARE)] for i in range(2))
            if reduced:
                if name in SMALL[:2]:
                    found.append(Shard(name, optimizer, 400, ("stable", "edge", "hover", "jump", "jump", rare[0])))
            elif net.size > 5e5:
                if optimizer in ("GD", "Adam"):
                    found.append(Shard(name, optimizer, 200, ("stable", "edge", "jump")))
            elif net.size > 1e4:
                found.append(Shard(name, optimizer, 450, ("edge", "hover", "jump", "jump", "fast warm-up", rare[0])))
            elif name in ("SiLU CNN, digits", "attention, digits"):
                some = ("edge", "hover", "jump", "jump", "fast warm-up", "ramp", *rare)
                found.append(Shard(name, optimizer, 400, some))
            else:
                found.append(Shard(name, optimizer, 600, _MANY))
    return found


def base_lr(net: Net, optimizer: Optimizer) -> float:
    """Learning rate at which the edge ratio peaks at ``_PEAK`` within the first steps (a pilot of six runs)."""
    peak = _PEAK_OF_NOISY_MOMENTUM if optimizer.momentum and not optimizer.full_batch else _PEAK
    low, high = (1e-4, 3e-2) if optimizer.betas else (1e-3, 1.0) if optimizer.momentum else (3e-3, 3.0)
    grid = np.geomspace(low, high, 6)
    steps = 80 if net.size < 5e5 else 45
    plans = [Plan(7, np.full(steps, lr), np.ones(steps)) for lr in grid]
    pilot = Simulation(net, optimizer, plans, read_every=8).run(check_every=steps)
    seen = np.stack([row[:, 0] for step, row in pilot.readings if step >= 30])
    peaks = np.where(np.isfinite(seen), seen, np.inf).max(axis=0)
    above = int(np.argmax(peaks > peak)) if (peaks > peak).any() else len(grid) - 1
    if above == 0 or not np.isfinite(peaks[above]):
        above = max(above, 1)
        return (
            float(grid[above - 1] * peak / max(peaks[above - 1], 1e-3)) if peaks[above - 1] < peak else float(grid[0])
        )
    share = math.log(peak / max(peaks[above - 1], 1e-6)) / math.log(peaks[above] / max(peaks[above - 1], 1e-6))
    return float(grid[above - 1] * (grid[above] / grid[above - 1]) ** min(max(share, 0.0), 1.0))


def plan(scenario: str, base: float, steps: int, seed: int) -> Plan:
    """What happens to one run, drawn at random."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)

    def between(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(math.log(low), math.log(high))))

    lr, made = np.full(steps, 2.0 * base), Plan(seed, np.empty(0), np.ones(steps))
    middle = int(rng.uniform(steps / 3, 2 * steps / 3))
    if scenario == "stable":
        lr[:] = base * between(0.3, 1.0)
    elif scenario == "decay":
        lr = base * between(2, 4) * (0.05 + 0.95 * (1 + np.cos(np.pi * t / steps)) / 2)
    elif scenario in ("edge", "hover"):
        lr = base * (between(4.5, 8) if scenario == "edge" else between(6, 11)) * np.minimum(1.0, (t + 1) / 50)
    elif scenario == "too large":
        lr[:] = base * between(8, 40)
    elif scenario == "ramp":
        lr = base * between(10, 60) ** np.clip((t - steps / 6) / (steps * 5 / 6), 0, 1) * 2
    elif scenario == "fast warm-up":
        lr = base * between(6, 30) * np.minimum(1.0, (t + 1) / int(rng.uniform(30, 60)))
    elif scenario == "slow warm-up":
        lr = base * between(6, 30) * np.minimum(1.0, (t + 1) / int(rng.uniform(steps / 4, steps / 2.4)))
    elif scenario == "jump":
        factor = between(1.5, 16)
        lr = base * rng.uniform(1.5, 3.0) * np.where(t >= middle, factor, 1.0)
        made.jump_at = middle
    elif scenario == "drop":
        lr = base * between(4, 8) * np.minimum(1.0, (t + 1) / 50) * np.where(t >= middle, 0.1, 1.0)
    elif scenario == "bad batch":
        made.inputs[middle : middle + int(rng.integers(1, 4))] = between(3, 30)
    elif scenario == "noise":
        lr[:] = base * between(2, 5)
        made.noise = float(rng.uniform(0.2, 0.5))
    elif scenario == "shift":
        made.shift_at = middle
    made.lr = np.asarray(lr)
    return made


def record(shard: Shard, seed_set: int, folder: Path, *, base: float | None = None) -> Path:
    """Train one shard and write what a monitor could know, and what only the labels may use; unless it is there."""
    path = folder / f"{seed_set}-{list(NETS).index(shard.net)}-{list(OPTIMIZERS).index(shard.optimizer)}.npz"
    if path.exists():
        return path
    net, optimizer = NETS[shard.net], OPTIMIZERS[shard.optimizer]
    base = base_lr(net, optimizer) if base is None else base
    first = (
        1_000_000 * seed_set + 10_000 * list(NETS).index(shard.net) + 1_000 * list(OPTIMIZERS).index(shard.optimizer)
    )
    plans = [plan(name, base, shard.steps, first + i) for i, name in enumerate(shard.scenarios)]
    done = Simulation(net, optimizer, plans).run()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        net=shard.net,
        optimizer=shard.optimizer,
        base=base,
        scenarios=np.array(shard.scenarios),
        seeds=np.array([p.seed for p in plans]),
        lr=np.stack([p.lr for p in plans]),
        jump_at=np.array([-1 if p.jump_at is None else p.jump_at for p in plans]),
        shift_at=np.array([-1 if p.shift_at is None else p.shift_at for p in plans]),
        fault_at=np.array([int(np.argmax(p.inputs != 1.0)) if (p.inputs != 1.0).any() else -1 for p in plans]),
        read_at=np.array([step for step, _ in done.readings]),
        read=np.stack([row for _, row in done.readings], 1),
        check_at=np.array([step for step, _ in done.checks]),
        check=np.stack([row for _, row in done.checks], 1),
        **done.series,
    )
    return path


@dataclass(frozen=True)
class Label:
    """What became of a run.

    Attributes:
        onset: Step at which its failure began; None if it did not fail.
        kind: Of a failure: jump, gradual, early (before step 30), data; else edge (bounded), calm.
    """

    onset: int | None
    kind: str


@dataclass(frozen=True)
class Run:
    """One recorded run and its label."""

    net: str
    optimizer: Optimizer
    scenario: str
    seed: int
    lr: np.ndarray
    loss: np.ndarray
    gradient: np.ndarray
    trial: np.ndarray
    relative_update: np.ndarray
    projection: np.ndarray
    random_projection: np.ndarray
    read_at: np.ndarray
    read: np.ndarray  # (readings, 4): edge ratio, error, batch sharpness, its error
    check_at: np.ndarray
    check: np.ndarray
    jump_at: int | None
    shift_at: int | None
    fault_at: int | None

    @property
    def steps(self) -> int:
        """Steps up to and with the first loss that was not recorded as finite."""
        lost = ~np.isfinite(self.loss)
        return int(np.argmax(lost)) + 1 if lost.any() else len(self.loss)

    @property
    def calibration(self) -> bool:
        """Which half of the development set it is in."""
        return bool(np.random.default_rng(self.seed).integers(2))

    @cached_property
    def label(self) -> Label:
        return label(self)


def load(folder: Path, seed_sets: Iterable[int]) -> Iterator[Run]:
    """Read recorded runs back."""
    for path in sorted(p for s in seed_sets for p in folder.glob(f"{s}-*.npz")):
        with np.load(path) as file:
            data: dict[str, Any] = dict(file)
        for i, scenario in enumerate(data["scenarios"]):
            marks = {
                key: None if data[key][i] < 0 else int(data[key][i]) for key in ("jump_at", "shift_at", "fault_at")
            }
            series = ("lr", "loss", "gradient", "trial", "relative_update", "projection", "random_projection")
            yield Run(
                net=str(data["net"]),
                optimizer=OPTIMIZERS[str(data["optimizer"])],
                scenario=str(scenario),
                seed=int(data["seeds"][i]),
                **{key: data[key][i] for key in (*series, "read", "check")},
                **{key: data[key] for key in ("read_at", "check_at")},
                **marks,
            )


def label(run: Run) -> Label:
    """From the outcome only; for runs that did not fail, from the edge ratio of all data."""
    onset = failure(run.loss)
    if onset is not None:
        # A bad batch or new labels ask too much of any rule about the optimizer.
        if any(at is not None and onset >= at for at in (run.shift_at, run.fault_at)):
            return Label(onset, "data")
        if run.jump_at is not None and run.jump_at <= onset <= run.jump_at + 60:
            return Label(onset, "jump")
        return Label(onset, "early" if onset < 30 else "gradual")
    high = run.check[run.check_at >= 35] >= 0.9  # before that, the state of Adam means nothing
    return Label(None, "edge" if bool((high[1:] & high[:-1]).any()) else "calm")


def failure(loss: np.ndarray) -> int | None:
    """Return the step from which on the loss was out of bounds and stayed there; None if it came back.

    Out of bounds: above 3 × the median of the 256 losses before, and above the first. Staying: on 90 % of the 50 steps
    that follow, against the same median. A loss that is not finite, or 10⁸ times the first, fails from the beginning
    of its last excursion.
    """
    start = float(np.median(loss[:5])) if np.isfinite(loss[:5]).all() else float(loss[0])
    finite = np.isfinite(loss)
    end = len(loss) if finite.all() else int(np.argmin(finite))
    blown = end < len(loss) or bool((loss[:end] > 1e8 * start).any())
    begun: int | None = None
    for t in range(1, end):
        median = float(np.median(loss[max(0, t - _LOOK_BACK) : t]))
        if loss[t] > _ABOVE * median:
            begun = t if begun is None else begun
            after = loss[t + 1 : t + 1 + _OF]
            out = ~np.isfinite(after) | ((after > _ABOVE * median) & (after > start))
            if loss[t] > start and len(after) and out.mean() >= _STAYS and (len(after) == _OF or blown):
                return t
        else:
            begun = None
    return (begun if begun is not None else max(end - 1, 0)) if blown else None
