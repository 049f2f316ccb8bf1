"""A loss curve of any length keeps its whole course."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eos_monitor import EdgeOfStabilityMonitor, Probe
from eos_monitor.callbacks import monitored_fit
from eos_monitor.dashboard import figures
from eos_monitor.dashboard.loss_curve import LossCurve
from tests.callbacks.runs import NAMESPACES, Case, run


@pytest.mark.parametrize("steps", [1, 3999, 4001, 100_000])
@pytest.mark.parametrize("begin", [0, 12_345])
def test_every_stretch_of_a_long_run_is_there(steps: int, begin: int) -> None:
    rng = np.random.default_rng(0)
    losses = np.exp(-np.arange(steps) / steps) + 0.01 * rng.standard_normal(steps)
    curve = LossCurve()
    for i, loss in enumerate(losses):
        curve.add(begin + i, float(loss))
    points = curve.points
    at = np.array([step for step, _ in points])
    assert len(points) <= 4002
    assert (at[0], at[-1]) == (begin, begin + steps - 1)
    assert (np.diff(at) > 0).all()
    np.testing.assert_array_equal([loss for _, loss in points], losses[at - begin])
    # 1000 stretches or more of one width, a point in each: no gap is wider than two of them.
    assert np.diff(at).max(initial=0) <= max(1, 2 * steps / 1000)
    # Half of the points lie in the first half.
    assert np.mean(at - begin < steps / 2) == pytest.approx(0.5, abs=0.02) or steps < 100


def test_no_spike_is_lost() -> None:
    """100,000 steps, of which a single one is high, and one low, wherever they are."""
    for high, low in ((7, 50_001), (33_333, 2), (99_998, 64_000)):
        curve = LossCurve()
        for step in range(100_000):
            curve.add(step, 9.0 if step == high else -9.0 if step == low else 1.0)
        assert {(high, 9.0), (low, -9.0)} <= set(curve.points)


def test_the_figure_of_a_run_gets_the_whole_curve(tmp_path: Path, monkeypatch: Any) -> None:
    drawn: list[Any] = []
    real = figures.run_figure
    monkeypatch.setattr(monitored_fit, "LossCurve", lambda: LossCurve(4))
    monkeypatch.setattr(figures, "run_figure", lambda rows, losses, title: drawn.append(losses) or real(rows, losses))
    watch = EdgeOfStabilityMonitor(8, probe=Probe(samples=8), alerts=())
    run(NAMESPACES[1], Case(trainer={"max_epochs": 8}), tmp_path / "run", lambda pl: watch)
    steps = [step for step, _ in drawn[0]]
    assert (steps[0], steps[-1]) == (0, 63)
    assert max(np.diff(steps)) <= 32  # four stretches of 16
    assert len(steps) <= 10
