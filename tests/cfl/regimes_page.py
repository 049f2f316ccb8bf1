"""Writes the table of borders into docs/cfl.md: ``python -m tests.cfl.regimes_page``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from eos_monitor.cfl.activations import read_activation
from eos_monitor.cfl.partition import ACTIVATED, TRANSITIONING

# What the page calls it -> torch's function and its arguments
_ROWS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "SiLU": ("silu", ()),
    "GELU": ("gelu", ()),
    "GELU, tanh form": ("gelu", ("tanh",)),
    "Mish": ("mish", ()),
    "Softplus": ("softplus", ()),
    "ELU, α = 1": ("elu", ()),
    "CELU, α = 2": ("celu", (2.0,)),
    "SELU": ("selu", ()),
    "tanh": ("tanh", ()),
    "sigmoid": ("sigmoid", ()),
    "Hardswish": ("hardswish", ()),
    "ReLU": ("relu", ()),
    "LeakyReLU, 0.01": ("leaky_relu", ()),
    "ReLU6": ("relu6", ()),
    "Hardtanh": ("hardtanh", ()),
}


def regimes_table() -> str:
    """Return the regimes of the activations as a Markdown table."""
    lines = ["| activation | transitioning | activated | not activated | kinks |", "|---|---|---|---|---|"]
    for title, (name, args) in _ROWS.items():
        activation = read_activation(name, args)
        assert activation is not None
        partition = activation.partition
        scale = activation.scale
        ends = [None, *(border / float(scale) for border in partition.borders), None]
        spans: dict[int, list[str]] = {}
        for regime, low, high in zip(partition.regimes, ends, ends[1:], strict=False):
            spans.setdefault(regime, []).append(_span(low, high))
        rest = next(r for r in (0, 1, 2) if r not in (ACTIVATED, TRANSITIONING))
        cells = ["; ".join(spans.get(regime, ["near kinks"])) for regime in (TRANSITIONING, ACTIVATED)]
        cells += ["; ".join(spans.get(rest, ["–"])), ", ".join(map(_number, partition.kinks)) or "–"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(x: float) -> str:
    return f"{x:.3f}".rstrip("0").rstrip(".").replace("-", "−")


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"z > {_number(low)}" if low is not None else f"z < {_number(high or 0.0)}"
    return f"{_number(low)} … {_number(high)}"


def main() -> None:
    """Write the table."""
    page = Path(__file__).parents[2] / "docs" / "cfl.md"
    text = page.read_text(encoding="utf-8")
    found = re.sub(
        r"(<!-- table:regimes -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{regimes_table()}\n{m[2]}",
        text,
        count=1,
        flags=re.S,
    )
    page.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
