"""The run in one picture. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Run = tuple[str, Sequence[Row], Sequence[tuple[int, float]]]

# Light grounds that keep their order in grey; the same hue means the same verdict everywhere.
VERDICT_COLORS = {
    "UNKNOWN": "#eeeeee",
    "WARMING_UP": "#e3e3f3",
    "STABLE": "#d9f0d3",
    "SHARPENING": "#fff3c4",
    "EDGE": "#fdd9a0",
    "RESTRAINED": "#f6b48f",
    "DIVERGING": "#ee8a82",
}
_BATCH_COLOR = "#2a7f3f"


def run_figure(rows: Sequence[Row], losses: Sequence[tuple[int, float]] = (), title: str = "") -> Figure:
    """Draw loss, normalized sharpness with its threshold and error band, and edge ratio over the verdicts.

    In minibatch runs of SGD lr · batch sharpness stands beside the normalized sharpness. It is held against the
    threshold; with momentum β against 2(1 − β), for small batches, and 2(1 + β), for large ones.

    Args:
        rows: Readings as plain rows, oldest first.
        losses: ``(step, training loss)``; the probe's losses are drawn where there are none.
        title: Heading.

    Raises:
        ImportError: If matplotlib is missing.
    """
    return runs_figure([(title, rows, losses)])


def runs_figure(runs: Sequence[Run]) -> Figure:
    """Draw several runs side by side, each like :func:`run_figure`.

    Args:
        runs: ``(title, rows, losses)`` of each.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    figure = Figure(figsize=(8.0 if len(runs) == 1 else 5.5 * len(runs), 7.0), layout="constrained")
    axes = figure.subplots(3, len(runs), sharex="col", squeeze=False)
    for column, (title, rows, losses) in zip(axes.T, runs, strict=True):
        column[0].set_title(title)
        _draw_loss(column[0], rows, losses)
        _draw_sharpness(column[1], rows)
        _draw_edge_ratio(column[2], rows)
        column[2].set_xlabel("optimizer step")
        column[2].margins(x=0.01)
    return figure


def pixels_of(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure to an array ``(height, width, 3)``, without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def normalized_batch_sharpness(row: Row) -> float | None:
    """Return lr · batch sharpness of a reading: 2 is the edge of SGD without momentum; None if it was not measured."""
    value = row.get("batch_sharpness")
    limits = row.get("batch_sharpness_limits")
    return None if value is None or limits is None else value * _batch_scale(limits)


def _batch_scale(limits: Sequence[float]) -> float:
    # The learning rate that the step has, dampening included: the limits 2(1 ∓ β)/lr add up to 4/lr.
    return 4.0 / (limits[0] + limits[1])


def _series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    kept = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in kept], [row[key] for row in kept]


def _draw_loss(ax: Axes, rows: Sequence[Row], losses: Sequence[tuple[int, float]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    steps, values = _series(rows, "loss")
    if losses:
        steps = [step for step, _ in losses]
        values = [loss for _, loss in losses]
    ax.plot(steps, values, color="#333333", linewidth=1.0)
    if values and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
        if max(values) < 100 * min(values):
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("training loss" if losses else "loss on the probe")


def _draw_sharpness(ax: Axes, rows: Sequence[Row]) -> None:
    steps, values = _series(rows, "normalized_sharpness")
    batchwise = [row for row in rows if normalized_batch_sharpness(row) is not None]
    if not values and not batchwise:
        steps, values = _series(rows, "sharpness")
        ax.set_ylabel("sharpness")
        _line(ax, steps, values, "#1f5a94", "λ_max(H)")
    else:
        ax.set_ylabel("normalized sharpness")
        _line(ax, steps, values, "#1f5a94", "lr · λ_max(P⁻¹(H + W))")
        known = [row for row in rows if row.get("normalized_sharpness") is not None and row.get("error") is not None]
        _band(
            ax,
            [row["step"] for row in known],
            [row["normalized_sharpness"] for row in known],
            [row["error"] * row["threshold"] for row in known],
            "#1f5a94",
            "± 2 · error",
        )
        if batchwise:
            values = [*_draw_batch_sharpness(ax, batchwise), *values]
        at, thresholds = _series(rows, "threshold")
        ax.plot(at, thresholds, color="#b3261e", linestyle="--", linewidth=1.0, label="threshold")
    if values:
        ax.set_ylim(bottom=min(0.0, *values))
        _legend(ax, values, columns=2 if batchwise else 1)


def _draw_batch_sharpness(ax: Axes, rows: Sequence[Row]) -> list[float]:
    """Draw lr · batch sharpness with its band, and its two limits where they differ; return what was drawn."""
    steps = [row["step"] for row in rows]
    scales = [_batch_scale(row["batch_sharpness_limits"]) for row in rows]
    values = [row["batch_sharpness"] * scale for row, scale in zip(rows, scales, strict=True)]
    _line(ax, steps, values, _BATCH_COLOR, "lr · batch sharpness")
    known = [i for i, row in enumerate(rows) if row.get("batch_sharpness_error") is not None]
    _band(
        ax,
        [steps[i] for i in known],
        [values[i] for i in known],
        [rows[i]["batch_sharpness_error"] * scales[i] for i in known],
        _BATCH_COLOR,
    )
    # Without momentum both are the threshold.
    if any(row["batch_sharpness_limits"][0] != row["batch_sharpness_limits"][1] for row in rows):
        for side, batches in ((0, "small"), (1, "large")):
            line = [row["batch_sharpness_limits"][side] * scale for row, scale in zip(rows, scales, strict=True)]
            ax.plot(
                steps,
                line,
                color=_BATCH_COLOR,
                linestyle=(":", "-.")[side],
                linewidth=1.0,
                label=f"its limit for {batches} batches",
            )
    return values


def _band(
    ax: Axes,
    steps: Sequence[int],
    middle: Sequence[float],
    errors: Sequence[float],
    color: str,
    label: str | None = None,
) -> None:
    ax.fill_between(
        steps,
        [m - 2 * e for m, e in zip(middle, errors, strict=True)],
        [m + 2 * e for m, e in zip(middle, errors, strict=True)],
        color=color,
        alpha=0.2,
        linewidth=0,
        label=label,
    )


def _draw_edge_ratio(ax: Axes, rows: Sequence[Row]) -> None:
    spans = [(row["step"], row.get("verdict", "UNKNOWN")) for row in rows]
    labelled: set[str] = set()
    for i, (start, verdict) in enumerate(spans):
        end = spans[i + 1][0] if i + 1 < len(spans) else start
        name = verdict if verdict not in labelled else None
        labelled.add(verdict)
        ax.axvspan(start, end, color=VERDICT_COLORS.get(verdict, "#ffffff"), linewidth=0, label=name)
    ax.axhline(1.0, color="#b3261e", linestyle="--", linewidth=1.0)
    steps, values = _series(rows, "edge_ratio")
    _line(ax, steps, values, "#333333", None)
    if values:
        ax.set_ylim(min(0.0, *values), max(1.1, 1.05 * max(values)))
    ax.set_ylabel("edge ratio")
    if labelled:
        _legend(ax, values)


def _legend(ax: Axes, values: Sequence[float], columns: int = 1) -> None:
    """Put the legend where the end of the curve is not."""
    low = bool(values) and values[-1] < 0.4 * ax.get_ylim()[1]
    ax.legend(loc="center right" if low else "lower right", fontsize="small", ncols=columns)


def _line(ax: Axes, steps: Sequence[int], values: Sequence[float], color: str, label: str | None) -> None:
    ax.plot(steps, values, color=color, linewidth=1.2, marker="." if len(steps) < 60 else None, label=label)
