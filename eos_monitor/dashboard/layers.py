"""Layers side by side: a heat map over the run, and a ranked table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_DOUBLINGS = 3
_REACH = 2.0**_DOUBLINGS  # of the colours, either side of the limit
_TALLEST = 14.0  # inches: the map
_LABEL = 0.15  # and what a legible name takes


def layers_table(layers: Sequence[Mapping[str, Any]], most: int = 5) -> str:
    """Return one sentence a layer, the closest to its limit first.

    Args:
        layers: Fields of ``CFLEstimate``, ranked.
        most: Number of layers to tell.
    """
    known = [layer for layer in layers if layer["method"] != "none"]
    lines = [_sentence(layer) for layer in known[:most]]
    if len(known) > most:
        lines.append(f"and {len(known) - most} more layers")
    missing = _not_attributed(layers)
    return "\n".join([*lines, missing] if missing else lines)


def run_sentence(rows: Sequence[Row], crossings: Mapping[str, int]) -> str:
    """Tell which layers crossed their limits, as far as anything is known of them.

    Args:
        rows: Readings, oldest first, as for :func:`layers_figure`.
        crossings: Times that each layer's number rose above 1.
    """
    layers = [layer for row in rows for layer in row["layers"]]
    missing = _not_attributed(rows[-1]["layers"])
    if not has_something_to_draw(rows):
        return f"no layer was attributed, so nothing is known of their limits; {missing or 'no curvature was found'}"
    if all(layer["cfl_number"] is None for layer in layers):
        told = "curvatures only, because the optimizer has no limit that is known"
    else:
        crossed = [f"{layer} {n} time{'s' * (n > 1)}" for layer, n in crossings.items() if n]
        told = (
            f"layers that crossed their own limits: {', '.join(crossed)}" if crossed else "no layer crossed its limit"
        )
    return f"{told}; {missing}" if missing else told


def has_something_to_draw(rows: Sequence[Row]) -> bool:
    """Whether anything is known of any layer in any reading."""
    return any(_map(rows, key)[0] for key in ("cfl_number", "curvature"))


def _not_attributed(layers: Sequence[Mapping[str, Any]]) -> str:
    missing: dict[str, list[str]] = {}
    for layer in layers:
        if layer["method"] == "none":
            missing.setdefault(layer["reason"], []).append(layer["layer"])
    told = (f"{', '.join(names)} ({reason})" for reason, names in missing.items())
    return f"not attributed: {'; '.join(told)}" if missing else ""


def layers_figure(rows: Sequence[Row], title: str = "") -> Figure:
    """Draw the CFL number of every layer over the run.

    Args:
        rows: Readings, oldest first: ``step`` and ``layers``, the fields of ``CFLEstimate``.
        title: Title of the figure.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names, values = _map(rows, "cfl_number")
    by_number = bool(names)
    if not by_number:
        names, values = _map(rows, "curvature")
    if not names:
        figure = Figure(figsize=(9.0, 2.0))
        figure.text(0.5, 0.5, "no layer was attributed", ha="center", va="center")
        return figure
    height = min(0.34 * max(len(names), 5), _TALLEST)
    figure = Figure(figsize=(8.0 + 0.08 * max(map(len, names)), 1.2 + height), layout="constrained")
    ax = figure.add_subplot(facecolor="0.85")  # what is not known stays grey
    # The limit is white, and a factor is as far on either side of it: doubling matters at 0.1 as it does at 1.
    cells = ax.pcolormesh(
        _edges([row["step"] for row in rows]),
        np.arange(len(names) + 1),
        np.clip(values, 1.0 / _REACH, None) if by_number else values,
        cmap="RdBu_r" if by_number else "viridis",
        norm=LogNorm(1.0 / _REACH, _REACH) if by_number else None,
    )
    if by_number:
        over = np.argwhere(values > 1.0)  # false where nothing is known
        ax.plot([rows[column]["step"] for _, column in over], over[:, 0] + 0.5, "k.", markersize=4)
    every = math.ceil(_LABEL * len(names) / height)
    ax.set_yticks(
        [i + 0.5 for i in range(0, len(names), every)],
        names[::every],
        fontsize=10 if every == 1 else 8,
    )
    ax.invert_yaxis()
    ax.set_xlabel("optimizer step (white: the limit, 1; dots: beyond it)" if by_number else "optimizer step")
    ax.set_title(title)
    label = "CFL number" if by_number else "curvature"
    bar = figure.colorbar(cells, ax=ax, label=label, extend="both" if by_number else "neither")
    if by_number:
        ticks = [2.0**i for i in range(-_DOUBLINGS, _DOUBLINGS + 1)]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
    return figure


def _map(rows: Sequence[Row], key: str) -> tuple[list[str], NDArray[np.float64]]:
    """Return the layers of which something is known, and their values ``(layers, rows)``; NaN is not known."""
    names = list(dict.fromkeys(layer["layer"] for layer in _in_order(rows)))
    values = np.full((len(names), len(rows)), np.nan)
    for column, row in enumerate(rows):
        for layer in row["layers"]:
            if layer["method"] != "none" and layer[key] is not None:
                values[names.index(layer["layer"]), column] = layer[key]
    shown = [i for i in range(len(names)) if not np.isnan(values[i]).all()]
    return [names[i] for i in shown], values[shown]


def _in_order(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """Return the layers of all rows in the order of the net, where the first row tells it."""
    found = [layer for row in rows for layer in row["layers"]]
    return sorted(found, key=lambda layer: int(layer.get("position", 0)))


def _edges(steps: Sequence[int]) -> list[float]:
    """Return the borders of the columns, halfway between the steps."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    return [steps[0] - (middles[0] - steps[0]), *middles, steps[-1] + (steps[-1] - middles[-1])]


def _short(number: float) -> str:
    return f"{number:.2f}" if number >= 0.1 else f"{number:.1g}"


def _sentence(layer: Mapping[str, Any]) -> str:
    number = layer["cfl_number"]
    what = f"curvature {layer['curvature']:.3g}" if number is None else f"at {_short(number)} of its limit"
    parts = [f"{layer['layer']} {what}, {layer['method']}"]
    if layer["method"] == "cheap" and layer["form"] == "weak":
        parts[0] += f" (weak: {layer['reason']})"
    if layer["activated"] + layer["transitioning"] + layer["not_activated"] > 0.0:
        parts.append(f"{layer['transitioning']:.0%} of its entries transitioning")
    if layer["top_mode_share"] is not None:
        parts.append(f"carries {layer['top_mode_share']:.0%} of the top mode")
    return "; ".join(parts)
