"""Record labelled runs, replay every rule on them, and rewrite the tables of docs/detector.md.

Recording a set takes about a quarter of an hour on one core, and is done once; the rest takes some minutes.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eos_monitor import Verdict
from eos_monitor.verdicts.jump_risk import _BOUNDS, class_of
from tests.benchmarks import detector_baselines as baselines
from tests.benchmarks.detector_scores import (
    JUMPS,
    STATISTICS,
    Said,
    Statistic,
    detect,
    failures,
    interval,
)
from tests.benchmarks.labelled_runs import NETS, Run, load, record, shards
from tests.benchmarks.tables import Table, write

DEVELOPMENT, FRESH = 11, 13  # seed sets; a change of rules takes a new fresh one (12 was that of the rules before)
_ALLOWED = 2.0  # false alarms per 10⁴ healthy steps that a cut may cost on the calibration half
_SLOW_SHARE = 6  # Lightning's class takes a millisecond a step: one run in so many
_STORE = Path.home() / ".cache" / "eos-monitor" / "labelled-runs"
_DOC = Path(__file__).parents[2] / "docs" / "detector.md"


def cell(statistic: Statistic, said: Sequence[Said], digits: int = 2) -> str:
    value, low, high = interval(statistic, said)
    return "–" if np.isnan(value) else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def suite(runs: Sequence[Run], name: str) -> Table:
    kinds = ("calm", "edge", "jump", "gradual", "early", "data")
    rows: list[list[object]] = []
    for net in NETS:
        counts = Counter(run.label.kind for run in runs if run.net == net)
        rows.append([f"{net} ({NETS[net].size:,})", sum(counts.values()), *(counts[kind] for kind in kinds)])
    counts = Counter(run.label.kind for run in runs)
    rows.append([f"all, {sum(run.steps for run in runs):,} steps", len(runs), *(counts[kind] for kind in kinds)])
    head = ["net (parameters)", "runs", "calm", "edge, bounded", "jump", "gradual", "early", "data fault"]
    return Table(name, head, rows)


def alarm_row(name: str, said: Sequence[Said]) -> list[object]:
    return [name, *(cell(statistic, said) for statistic in STATISTICS.values())]


def alarms(fresh: Sequence[Said], development: Sequence[Said]) -> Table:
    """The detector and the baselines, on fresh runs; cuts from the calibration half."""
    calibration = [said.run for said in development if said.run.calibration]
    runs = [said.run for said in fresh]
    rows = [alarm_row("DIVERGING", fresh)]
    for name, score, usual in (
        ("loss z", baselines.loss_z, 3.0),
        ("gradient-norm z", baselines.gradient_z, 2.5),
        ("loss at θ + update, growth over 8 steps", baselines.trial_growth, None),
        ("growth along the critical mode past the edge", baselines.amplitude_growth, None),
    ):
        if usual is not None:
            rows.append(alarm_row(f"{name} > {usual:g}", baselines.at_cut(score, runs, usual)))
        cut = baselines.calibrated(score, calibration, _ALLOWED)
        rows.append(alarm_row(f"{name} > {cut:.2g} (calibrated)", baselines.at_cut(score, runs, cut)))
    some = runs[::_SLOW_SHARE]
    rows.append(alarm_row(f"Lightning's SpikeDetection ({len(some)} runs)", baselines.spike_detection(some)))
    changes = baselines.cusum(runs)
    if changes is not None:
        rows.append(alarm_row("trainscope's CUSUM", changes))
    return Table("alarms", ["rule", *STATISTICS], rows)


def halves(development: Sequence[Said], fresh: Sequence[Said]) -> Table:
    parts = {
        "calibration": [said for said in development if said.run.calibration],
        "test": [said for said in development if not said.run.calibration],
        "fresh": list(fresh),
        "fresh, full batch": [said for said in fresh if said.run.optimizer.full_batch],
        "fresh, minibatches": [said for said in fresh if not said.run.optimizer.full_batch],
    }
    return Table("halves", ["runs", *STATISTICS], [alarm_row(f"{name} ({len(s)})", s) for name, s in parts.items()])


def lateness(fresh: Sequence[Said]) -> Table:
    rows: list[list[object]] = []
    for kind in ("jump", "gradual", "early"):
        failed = failures(fresh, kind)
        lags = [said.lag for said in failed if said.hit and said.lag is not None]
        blown = sum(not np.isfinite(said.run.loss).all() for said in failed)
        shares = [f"{np.percentile(lags, q):.0f}" for q in (10, 50, 90)] if lags else ["–"] * 3
        rows.append([kind, len(failed), sum(said.hit for said in failed), *shares, blown])
    return Table("lateness", ["failures", "runs", "called", "10 %", "median", "90 %", "not finite in the end"], rows)


def jumps(parts: dict[str, tuple[Sequence[Said], Sequence[Said]]]) -> Table:
    rows: list[list[object]] = []
    for name, (scheduled, by_hand) in parts.items():
        for how, said in (("by schedule", scheduled), ("by hand", by_hand)):
            counts = [
                len(failures(said, "jump")),
                sum(s.survived_jump for s in said),
            ]
            rows.append([f"{name}, {how}", *counts, *(cell(statistic, said) for statistic in JUMPS.values())])
    return Table("jumps", ["runs", "failing", "surviving", *JUMPS], rows)


def risks(runs: Sequence[Run]) -> Table:
    """How many jumps to an edge ratio of r0 failed, by class: what the advisory quotes."""
    bounds = (0.0, *_BOUNDS, np.inf)
    counts: dict[str, list[list[int]]] = defaultdict(lambda: [[0, 0] for _ in bounds[1:]])
    for run in runs:
        r0 = ratio_after_jump(run)
        if r0 is not None and run.label.kind in ("jump", "edge", "calm"):
            kind = class_of(run.optimizer.family, run.optimizer.beta, run.optimizer.full_batch)
            place = counts[kind][sum(r0 > bound for bound in _BOUNDS)]
            place[0] += run.label.kind == "jump"
            place[1] += 1
    head = ["failed of jumps to r0 in", *(f"{a:g}–{b:g}" for a, b in zip(bounds, bounds[1:], strict=False))]
    return Table("risks", head, [[kind, *(f"{a} of {b}" for a, b in row)] for kind, row in sorted(counts.items())])


def ratio_after_jump(run: Run) -> float | None:
    if run.jump_at is None:
        return None
    seen = [(s, r) for s, r in zip(run.read_at, run.read[:, 0], strict=True) if s <= run.jump_at and np.isfinite(r)]
    if not seen:
        return None
    step, r = seen[-1]
    return float(r * run.lr[run.jump_at] / run.lr[step])


def short_twin(said: Sequence[Said]) -> Table:
    """Steps of a copy at the new learning rate, as a second opinion on flagged jumps: its loss over the one before."""
    chosen = [s for s in said if s.run.scenario == "jump" and s.kind in ("jump", "edge", "calm") and s.flagged]
    rows: list[list[object]] = []
    for steps in (1, 2, 4, 8, 16):
        failed, held = [], []
        for s in chosen:
            at = s.run.jump_at
            assert at is not None
            before, after = (
                float(np.median(s.run.loss[at - 20 : at])),
                float(s.run.loss[min(at + steps, s.run.steps - 1)]),
            )
            growth = after / before if np.isfinite(after) else np.inf
            (failed if s.kind == "jump" else held).append(growth)
        auc = np.mean([(a > b) + 0.5 * (a == b) for a in failed for b in held]) if failed and held else np.nan
        low = np.quantile(failed, 0.1) if failed else np.nan
        spared = np.mean([b < low for b in held]) if held else np.nan
        rows.append([steps, len(failed), len(held), f"{auc:.2f}", f"{spared:.2f}"])
    return Table("twin", ["steps", "failing", "surviving", "AUC", "survivors spared at 90 % of failures kept"], rows)


def shares(fresh: Sequence[Said]) -> Table:
    def full(s: Said) -> bool:
        return s.run.optimizer.full_batch

    parts: dict[str, list[Said]] = {
        "small learning rates, full batch": [
            s for s in fresh if s.run.scenario == "stable" and s.kind == "calm" and full(s)
        ],
        "calm, full batch": [s for s in fresh if s.kind == "calm" and full(s)],
        "calm, minibatches": [s for s in fresh if s.kind == "calm" and not full(s)],
        "edge, full batch": [s for s in fresh if s.kind == "edge" and full(s)],
        "edge, minibatches": [s for s in fresh if s.kind == "edge" and not full(s)],
    }
    rows: list[list[object]] = []
    for name, found in parts.items():
        said = np.concatenate([s.verdicts for s in found if s.verdicts is not None]) if found else np.array([])
        rows.append(
            [f"{name} ({len(found)} runs)", *(f"{(said == v).mean():.3f}" if len(said) else "–" for v in Verdict)]
        )
    return Table("shares", ["steps of", *(v.name for v in Verdict)], rows)


def tables(store: Path, development: int, fresh: int) -> list[Table]:
    old, new = list(load(store, [development])), list(load(store, [fresh]))
    said = {
        name: [detect(run) for run in tqdm(runs, desc=name)] for name, runs in (("development", old), ("fresh", new))
    }
    by_hand = [detect(run, by_hand=True) for run in tqdm(new, desc="by hand")]
    test = [s for s in said["development"] if not s.run.calibration]
    return [
        suite(old, "development"),
        suite(new, "fresh"),
        alarms(said["fresh"], said["development"]),
        halves(said["development"], said["fresh"]),
        lateness(said["fresh"]),
        jumps({"fresh": (said["fresh"], by_hand), "test half": (test, [detect(s.run, by_hand=True) for s in test])}),
        risks(old),
        short_twin(said["fresh"]),
        shares(said["fresh"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.detector", description=__doc__)
    parser.add_argument("--store", type=Path, default=_STORE, help="folder of the recorded runs (default %(default)s)")
    parser.add_argument("--no-write", action="store_true", help="leave docs/detector.md alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for seed_set in (DEVELOPMENT, FRESH):
        for shard in tqdm(shards(), desc=f"record set {seed_set}"):
            record(shard, seed_set, args.store)
    found = tables(args.store, DEVELOPMENT, FRESH)
    for table in found:
        print(f"\n{table.name}\n{table.markdown()}")
    if not args.no_write:
        write(found, _DOC)


if __name__ == "__main__":
    main()
