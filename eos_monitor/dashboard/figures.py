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


def run_figure(rows: Sequence[Row], losses: Sequence[tuple[int, float]] = (), title: str = "") -> Figure:
    """Draw loss, normalized sharpness with its threshold and error band, and edge ratio over the verdicts.

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


def _series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    kept = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in kept], [row[key] for row in kept]


def _draw_loss(ax: Axes, rows: Sequence[Row], losses: Sequence[tuple[int, float]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    steps, values = ([s for s, _ in losses], [v for _, v in losses]) if losses else _series(rows, "loss")
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
    if not values:
        steps, values = _series(rows, "sharpness")
        ax.set_ylabel("sharpness")
        _line(ax, steps, values, "#1f5a94", "λ_max(H)")
    else:
        ax.set_ylabel("normalized sharpness")
        _line(ax, steps, values, "#1f5a94", "lr · λ_max(P⁻¹(H + W))")
        known = [row for row in rows if row.get("normalized_sharpness") is not None and row.get("error") is not None]
        bands = [row["error"] * row["threshold"] for row in known]
        middle = [row["normalized_sharpness"] for row in known]
        ax.fill_between(
            [row["step"] for row in known],
            [m - 2 * b for m, b in zip(middle, bands, strict=True)],
            [m + 2 * b for m, b in zip(middle, bands, strict=True)],
            color="#1f5a94",
            alpha=0.2,
            linewidth=0,
            label="± 2 · error",
        )
        at, thresholds = _series(rows, "threshold")
        ax.plot(at, thresholds, color="#b3261e", linestyle="--", linewidth=1.0, label="threshold")
    if values:
        ax.set_ylim(bottom=min(0.0, *values))
        _legend(ax, values)


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


def _legend(ax: Axes, values: Sequence[float]) -> None:
    """Put the legend where the end of the curve is not."""
    low = bool(values) and values[-1] < 0.4 * ax.get_ylim()[1]
    ax.legend(loc="center right" if low else "lower right", fontsize="small")


def _line(ax: Axes, steps: Sequence[int], values: Sequence[float], color: str, label: str | None) -> None:
    ax.plot(steps, values, color=color, linewidth=1.2, marker="." if len(steps) < 60 else None, label=label)
