"""Layout, figures and report, from made rows."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from eos_monitor import EdgeOfStabilityMonitor
from eos_monitor.dashboard.figures import VERDICT_COLORS, pixels_of, run_figure, runs_figure
from eos_monitor.dashboard.layout import custom_scalars_layout
from eos_monitor.dashboard.report import run_report


def row(step: int, ratio: float | None, verdict: str = "STABLE", **changes: Any) -> dict[str, Any]:
    """One reading of gradient descent with lr 0.1."""
    return {
        "step": step,
        "loss": 1.0 / (step + 1),
        "edge_ratio": ratio,
        "normalized_sharpness": None if ratio is None else 2 * ratio,
        "sharpness": None if ratio is None else 20 * ratio,
        "threshold": 2.0,
        "error": 0.01,
        "edge_lr": None if ratio is None else [0.1 / max(ratio, 0.01)],
        "full_batch": True,
        "converged": True,
        "seconds": 0.25,
        "matvecs": 4,
        "notes": [],
        "verdict": verdict,
    } | changes


CLIMB = [row(0, 0.25), row(10, 0.5), row(20, 1.0, "EDGE"), row(30, 1.25, "EDGE")]


def tags_of(layout: dict[str, Any]) -> list[str]:
    return [tag for charts in layout.values() for kind, tags in charts.values() if kind == "Multiline" for tag in tags]


# ---------------------------------------------------------------- layout


def test_layout_tags_match_one_key_each() -> None:
    keys = ["eos/edge_ratio", "eos/edge_ratio_next", "eos/sharpness", "eos/normalized_sharpness", "neos/sharpness"]
    matches = {key: [tag for tag in tags_of(custom_scalars_layout()) if re.search(tag, key)] for key in keys}
    assert matches == {
        "eos/edge_ratio": ["^eos/edge_ratio$"],
        "eos/edge_ratio_next": ["^eos/edge_ratio_next$"],
        "eos/sharpness": ["^eos/sharpness$"],
        "eos/normalized_sharpness": ["^eos/normalized_sharpness$"],
        "neos/sharpness": [],
    }


def test_layout_draws_only_documented_keys() -> None:
    documented = re.findall(r"``(eos/\w+)", EdgeOfStabilityMonitor.__doc__ or "")
    for tag in tags_of(custom_scalars_layout()):
        assert sum(re.search(tag, key) is not None for key in documented) == 1, tag


def test_layout_takes_the_name_of_the_monitor_literally() -> None:
    tags = tags_of(custom_scalars_layout("net (a+b)"))
    assert any(re.search(tag, "net (a+b)/edge_ratio") for tag in tags)
    assert not any(re.search(tag, "eos/edge_ratio") for tag in tags)


# ---------------------------------------------------------------- figures


def test_figure_shows_losses_sharpness_and_edge_ratio() -> None:
    losses = [(step, 2.0 ** -(step / 4)) for step in range(31)]
    loss, sharpness, ratio = run_figure(CLIMB, losses, title="a run").axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), losses)
    assert (loss.get_title(), loss.get_ylabel(), loss.get_yscale()) == ("a run", "training loss", "log")
    np.testing.assert_array_equal(sharpness.lines[0].get_ydata(), [0.5, 1.0, 2.0, 2.5])
    np.testing.assert_array_equal(sharpness.lines[1].get_ydata(), [2.0] * 4)
    assert sharpness.lines[1].get_linestyle() == "--"
    curve = next(line for line in ratio.lines if len(line.get_xdata()) == 4)
    np.testing.assert_array_equal(curve.get_xydata(), [(0, 0.25), (10, 0.5), (20, 1.0), (30, 1.25)])
    assert ratio.get_xlabel() == "optimizer step"


def test_figure_draws_the_probe_loss_without_training_losses() -> None:
    loss = run_figure(CLIMB).axes[0]
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [r["loss"] for r in CLIMB])
    assert loss.get_ylabel() == "loss on the probe"


def test_figure_keeps_a_flat_loss_linear() -> None:
    assert run_figure(CLIMB, [(0, 1.0), (30, 0.5)]).axes[0].get_yscale() == "linear"


def test_error_band_is_two_errors_wide_in_units_of_sharpness() -> None:
    sharpness = run_figure([row(0, 0.5, error=0.05), row(10, 0.5, error=0.05)]).axes[1]
    (band,) = sharpness.collections
    heights = band.get_paths()[0].vertices[:, 1]
    # normalized sharpness 1, error 0.05 of an edge ratio, which is 0.1 of lr·λ where the threshold is 2
    assert (heights.min(), heights.max()) == pytest.approx((0.8, 1.2))


def batch_row(step: int, value: float, error: float | None, limits: list[float], **changes: Any) -> dict[str, Any]:
    """One reading of minibatch SGD."""
    batchwise = {"batch_sharpness": value, "batch_sharpness_error": error, "batch_sharpness_limits": limits}
    return row(step, 0.5, full_batch=False, **batchwise, **changes)


def test_batch_sharpness_stands_beside_the_normalized_sharpness() -> None:
    # lr 0.1, then 0.2: the limits are 2/lr, and lr · BS is 1.5 and 2
    rows = [batch_row(0, 15.0, 0.5, [20.0, 20.0]), batch_row(10, 10.0, 0.5, [10.0, 10.0])]
    sharpness = run_figure(rows).axes[1]
    lines = {line.get_label(): line for line in sharpness.lines}
    assert list(lines) == ["lr · λ_max(P⁻¹(H + W))", "lr · batch sharpness", "threshold"]
    np.testing.assert_allclose(lines["lr · batch sharpness"].get_xydata(), [(0, 1.5), (10, 2.0)])
    heights = sharpness.collections[1].get_paths()[0].vertices[:, 1]
    # two errors of 0.05 and of 0.1
    assert (heights.min(), heights.max()) == pytest.approx((1.4, 2.2))


def test_batch_sharpness_under_momentum_has_two_limits() -> None:
    # lr 0.1, momentum 0.9
    rows = [batch_row(step, 8.0, None, [2.0, 38.0], threshold=3.8) for step in (0, 10)]
    lines = {line.get_label(): line.get_ydata() for line in run_figure(rows).axes[1].lines}
    np.testing.assert_allclose(lines["lr · batch sharpness"], [0.8, 0.8])
    np.testing.assert_allclose(lines["its limit for small batches"], [0.2, 0.2])
    np.testing.assert_allclose(lines["its limit for large batches"], [3.8, 3.8])


def test_batch_sharpness_without_an_edge_ratio_is_drawn() -> None:
    rows = [r | {"edge_ratio": None, "normalized_sharpness": None} for r in [batch_row(0, 10.0, 0.5, [20.0, 20.0])]]
    lines = {line.get_label(): line.get_ydata() for line in run_figure(rows).axes[1].lines}
    np.testing.assert_allclose(lines["lr · batch sharpness"], [1.0])


def test_ground_is_coloured_by_verdict() -> None:
    ratio = run_figure(CLIMB).axes[2]
    spans = [(p.get_x(), p.get_x() + p.get_width(), to_hex(p.get_facecolor())) for p in ratio.patches]
    stable = VERDICT_COLORS["STABLE"]
    edge = VERDICT_COLORS["EDGE"]
    assert spans == [(0, 10, stable), (10, 20, stable), (20, 30, edge), (30, 30, edge)]
    assert [text.get_text() for text in ratio.get_legend().get_texts()] == ["STABLE", "EDGE"]


def test_every_verdict_has_its_own_colour() -> None:
    from eos_monitor import Verdict

    assert set(VERDICT_COLORS) == {verdict.name for verdict in Verdict}
    assert len(set(VERDICT_COLORS.values())) == len(Verdict)


def test_figure_without_a_threshold_shows_the_sharpness() -> None:
    rows = [r | {"normalized_sharpness": None, "threshold": None} for r in CLIMB]
    sharpness = run_figure(rows).axes[1]
    assert sharpness.get_ylabel() == "sharpness"
    np.testing.assert_array_equal(sharpness.lines[0].get_ydata(), [5.0, 10.0, 20.0, 25.0])


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="no rows"),
        pytest.param([row(0, None, "WARMING_UP", threshold=None, error=None)], id="nothing measured"),
        pytest.param([row(0, 0.5)], id="one reading"),
        pytest.param([row(0, -0.1), row(1, 0.0)], id="no positive curvature"),
    ],
)
def test_figure_of_poor_runs_can_be_drawn(rows: list[dict[str, Any]]) -> None:
    assert pixels_of(run_figure(rows)).std() > 0


def test_legend_leaves_the_end_of_a_low_curve_free() -> None:
    figure = run_figure([row(0, 0.05), row(10, 0.02)])
    pixels_of(figure)  # lays it out
    axes = figure.axes[2]
    box = axes.get_legend().get_window_extent()
    end = axes.transData.transform((10, 0.02))
    assert not box.contains(*end)


def test_runs_stand_side_by_side() -> None:
    figure = runs_figure([("first", CLIMB, []), ("second", CLIMB[:2], [])])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["first", "second"]
    assert len(figure.axes) == 6


def test_pixels_are_height_width_and_colour() -> None:
    figure = run_figure(CLIMB)
    width, height = (figure.get_size_inches() * figure.dpi).astype(int)
    pixels = pixels_of(figure)
    assert (pixels.shape, pixels.dtype) == ((height, width, 3), np.uint8)


# ---------------------------------------------------------------- report


def test_report_tells_the_climb() -> None:
    changes = [(0, "WARMING_UP"), (0, "STABLE"), (20, "EDGE")]
    assert run_report(CLIMB, changes, overhead=0.05).splitlines() == [
        "4 readings, steps 0 to 30.",
        "Edge ratio 0.25 at step 0, 1.25 at step 30; highest 1.25 at step 30 (1 is the full-batch edge). At the end "
        "the edge was at lr 0.08.",
        "Verdicts: STABLE from step 0, EDGE from step 20; of the steps 67% STABLE, 33% EDGE.",
        "Cost: 1 s in readings, median 4 products each, 5.0% of the training time.",
    ]


def test_report_of_a_restless_run_tells_shares_and_the_end() -> None:
    changes = [(step, "EDGE" if i % 2 else "STABLE") for i, step in enumerate(range(0, 80, 10))]
    text = run_report(CLIMB, changes, last_step=110, reason="The edge ratio hovers at 1: 1.02 now.")
    assert (
        "The verdict changed 7 times and ended as EDGE; of the steps 64% EDGE, 36% STABLE. "
        "At the end: The edge ratio hovers at 1: 1.02 now." in text.splitlines()
    )


def test_report_without_readings() -> None:
    assert run_report([], []) == "No reading was taken."


def test_report_of_one_reading() -> None:
    first, edge, *_ = run_report([row(7, 0.5)], []).splitlines()
    assert first == "1 reading, at step 7."
    assert edge == "Edge ratio 0.5 at step 7 (1 is the full-batch edge). At the end the edge was at lr 0.2."


def test_report_on_minibatches_gives_no_learning_rate_and_warns() -> None:
    text = run_report([r | {"full_batch": False} for r in CLIMB], [])
    assert "At the end the edge was" not in text
    assert "a small ratio does not say that the run is stable" in text


def test_report_without_an_edge() -> None:
    text = run_report([row(0, None, notes=["Lion has no threshold"], matvecs=0)] * 2, [])
    assert "None of them has an edge ratio." in text
    assert "products" not in text
    assert text.count("Note: Lion has no threshold.") == 1


@pytest.mark.parametrize(("poor", "words"), [(1, "1 reading did not"), (2, "2 readings did not")], ids=["one", "two"])
def test_report_counts_readings_that_did_not_converge(poor: int, words: str) -> None:
    rows = [*CLIMB, *(row(40 + i, 1.0, converged=False) for i in range(poor))]
    assert f"{words} converge." in run_report(rows, [])
