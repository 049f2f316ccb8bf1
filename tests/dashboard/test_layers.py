"""Heat map and table of layers, from made rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from eos_monitor.dashboard.figures import pixels_of
from eos_monitor.dashboard.layers import layers_figure, layers_table


def layer(name: str, number: float | None, position: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "layer": name,
        "activated": 0.25,
        "transitioning": 0.41,
        "not_activated": 0.34,
        "curvature": 7.0,
        "method": "exact",
        "lr_max": 0.1 / number if number else None,
        "cfl_number": number,
        "form": "approximate",
        "reason": "",
        "top_mode_share": 0.62,
        "position": position,
    } | changes


def rows(numbers: Sequence[Sequence[float]], steps: Sequence[int] = (0, 10, 20)) -> list[dict[str, Any]]:
    """One row a step; the layers of each are ranked, as the monitor writes them."""
    found = []
    for step, at_step in zip(steps, numbers, strict=False):
        layers = [layer(f"conv{i}", number, i) for i, number in enumerate(at_step)]
        found.append({"step": step, "layers": sorted(layers, key=lambda e: -e["cfl_number"])})
    return found


def cells(figure: Any) -> Any:
    (mesh,) = figure.axes[0].collections
    return mesh


def labels(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


CLIMB = rows([[0.2, 0.3, 0.15], [0.4, 0.9, 0.2], [0.5, 1.3, 0.2]])


def test_layers_are_in_the_order_of_the_net_and_steps_in_that_of_the_run() -> None:
    figure = layers_figure(CLIMB, title="a run")
    axes = figure.axes[0]
    assert labels(figure) == ["conv0", "conv1", "conv2"]
    assert axes.yaxis_inverted()  # the first layer on top
    np.testing.assert_allclose(cells(figure).get_array(), [[0.2, 0.4, 0.5], [0.3, 0.9, 1.3], [0.15, 0.2, 0.2]])
    assert axes.get_xlabel().startswith("optimizer step")
    assert axes.get_title() == "a run"


def test_limit_is_white_and_both_sides_are_as_far_as_their_factor() -> None:
    mesh = cells(layers_figure(CLIMB))
    white, half, twice = (mesh.cmap(mesh.norm(x))[:3] for x in (1.0, 0.5, 2.0))
    assert min(white) > 0.95
    assert half[2] > half[0] + 0.1  # blue below
    assert twice[0] > twice[2] + 0.1  # red above
    assert mesh.norm(2.0) - mesh.norm(1.0) == pytest.approx(mesh.norm(1.0) - mesh.norm(0.5))


def test_colours_mean_the_same_in_every_figure() -> None:
    calm, wild = (cells(layers_figure(rows([[x]]))) for x in (0.1, 1e9))
    assert (calm.norm.vmin, calm.norm.vmax) == (wild.norm.vmin, wild.norm.vmax) == (0.125, 8.0)


def test_cells_beyond_the_limit_have_dots() -> None:
    """1.05 is as good as white."""
    (dots,) = layers_figure(rows([[0.5, 1.05], [1.0, 0.99], [3.0, 0.2]])).axes[0].lines
    assert sorted(map(tuple, dots.get_xydata())) == [(0.0, 1.5), (20.0, 0.5)]
    assert dots.get_linestyle() == "None"


def test_colour_bar_has_the_limit_among_its_ticks() -> None:
    bar = layers_figure(CLIMB).axes[1]
    assert [text.get_text() for text in bar.get_yticklabels()] == ["0.125", "0.25", "0.5", "1", "2", "4", "8"]
    assert bar.get_ylabel() == "CFL number"


def test_columns_meet_halfway_between_readings() -> None:
    figure = layers_figure(rows([[0.1]] * 3, steps=(0, 10, 40)))
    edges = cells(figure).get_coordinates()[0, :, 0]
    np.testing.assert_allclose(edges, [-5.0, 5.0, 25.0, 55.0])


def test_rows_after_a_resume_do_not_fold_back() -> None:
    """A run that is fitted on begins again at a step that was there already."""
    edges = cells(layers_figure(rows([[0.1]] * 3, steps=(0, 10, 10)))).get_coordinates()[0, :, 0]
    assert (np.diff(edges) >= 0).all()


def test_what_is_not_known_is_grey_and_what_never_is_has_no_row() -> None:
    made = [
        {"step": 0, "layers": [layer("a", 0.5, 0), layer("b", 0.5, 1), layer("c", None, 2, method="none")]},
        {"step": 10, "layers": [layer("a", 0.5, 0), layer("b", None, 1), layer("c", None, 2, method="none")]},
    ]
    figure = layers_figure(made)
    assert labels(figure) == ["a", "b"]
    assert to_rgb(figure.axes[0].get_facecolor()) == pytest.approx((0.85,) * 3)
    assert cells(figure).get_array().mask.tolist() == [[False, False], [False, True]]


def test_layers_without_curvature_are_as_blue_as_it_gets() -> None:
    mesh = cells(layers_figure(rows([[0.0, 0.5]])))
    assert not np.ma.is_masked(mesh.get_array())
    assert mesh.norm(float(mesh.get_array()[0, 0])) == 0.0


def test_curvature_is_drawn_where_no_layer_has_a_number() -> None:
    figure = layers_figure([{"step": s, "layers": [layer("a", None), layer("b", None, 1)]} for s in (0, 1)])
    assert figure.axes[1].get_ylabel() == "curvature"
    np.testing.assert_array_equal(cells(figure).get_array(), [[7.0, 7.0]] * 2)


@pytest.mark.parametrize("count", [1, 30, 200])
def test_labels_do_not_overlap_however_many_layers(count: int) -> None:
    names = [f"model.encoder.layers.{i}.mlp.up_projection" for i in range(count)]
    made = [
        {"step": s, "layers": [layer(name, 0.1 + 0.9 * i / count, i) for i, name in enumerate(names)]} for s in (0, 5)
    ]
    figure = layers_figure(made)
    pixels = pixels_of(figure)  # lays it out
    assert max(pixels.shape[:2]) < 4000
    boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert len(boxes) == count if count <= 30 else len(boxes) >= 60
    assert all(upper.y0 >= lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False))
    assert min(box.x0 for box in boxes) >= 0
    assert figure.axes[0].get_window_extent().width > 400


@pytest.mark.parametrize(
    "made",
    [
        pytest.param([], id="no rows"),
        pytest.param([{"step": 0, "layers": []}], id="no layers"),
        pytest.param([{"step": 0, "layers": [layer("a", None, method="none")]}], id="nothing attributed"),
        pytest.param(rows([[math.inf]]), id="infinite"),
    ],
)
def test_poor_runs_can_be_drawn(made: list[dict[str, Any]]) -> None:
    assert pixels_of(layers_figure(made)).std() > 0


# ---------------------------------------------------------------- table


def test_table_tells_each_layer_in_a_sentence() -> None:
    found = [
        layer("conv2", 1.31),
        layer("head", 0.5, method="cheap", activated=0.0, transitioning=0.0, not_activated=0.0, top_mode_share=None),
        layer("norm", 0.25, method="cheap", form="weak", reason="its weight is used 2 times"),
        layer("other", None, top_mode_share=None),
        layer("calm", 0.0123, activated=0.0, transitioning=0.0, not_activated=0.0, top_mode_share=None),
        layer("gone", None, method="none", reason="not used in this batch"),
        layer("ice", None, method="none", reason="frozen"),
        layer("lost", None, method="none", reason="not used in this batch"),
    ]
    assert layers_table(found).splitlines() == [
        "conv2 at 1.31 of its limit, exact; 41% of its entries transitioning; carries 62% of the top mode",
        "head at 0.50 of its limit, cheap",
        "norm at 0.25 of its limit, cheap (weak: its weight is used 2 times); 41% of its entries transitioning; "
        "carries 62% of the top mode",
        "other curvature 7, exact; 41% of its entries transitioning",
        "calm at 0.01 of its limit, exact",
        "not attributed: gone, lost (not used in this batch); ice (frozen)",
    ]


def test_table_counts_what_it_leaves_out() -> None:
    lines = layers_table([layer(f"l{i}", 1.0 - i / 10) for i in range(8)], most=3).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["l0", "l1", "l2"]
    assert lines[3:] == ["and 5 more layers"]
    assert layers_table([]) == ""
