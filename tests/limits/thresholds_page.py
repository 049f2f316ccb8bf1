"""Write the tables of docs/thresholds.md: formulas from the rules' docstrings, and the live runs.

python -m tests.limits.thresholds_page [--formulas]    about three minutes, seconds without the runs
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eos_monitor.limits import neighbours, thresholds
from eos_monitor.limits.thresholds import Rule
from tests.benchmarks.live_edges import BAND, CASES, Live, run
from tests.benchmarks.tables import Progress, Table, write

PAGE = Path(__file__).parents[2] / "docs" / "thresholds.md"


def parts(rule: Rule) -> list[str]:
    """Return a rule's formula, its source and what is experimental, from its docstring."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(rule.__doc__ or "").split("\n\n")]
    rest = " ".join(part for part in paragraphs[1:] if part.startswith("Source:"))
    source, _, experimental = rest.removeprefix("Source:").partition("Experimental:")
    # A bar would end the cell.
    return [
        text.strip().replace("|", "\\|").replace("``", "`") or "–" for text in (paragraphs[0], source, experimental)
    ]


def _without_threshold(rule: Rule) -> bool:
    return (rule.__doc__ or "").startswith("None:")


def formulas() -> list[Table]:
    """Return the tables that take no run."""
    of_torch = {cls.__name__: rule for cls, rule in thresholds._RULES.items() if cls.__module__.startswith("torch.")}
    others = {f"{name} ({', '.join(entry.libraries)})": entry.rule for name, entry in neighbours.NEIGHBOURS.items()}
    none = {**of_torch, **neighbours.WITHOUT_THRESHOLD}
    head = ["optimizer", "critical curvature c", "source", "experimental"]
    return [
        Table("formulas", head, _rows({k: rule for k, rule in of_torch.items() if not _without_threshold(rule)})),
        Table("neighbours", head, _rows(others)),
        Table("none", ["why", "optimizers"], _reasons({k: r for k, r in none.items() if _without_threshold(r)})),
    ]


def _rows(rules: Mapping[str, Rule]) -> list[list[str]]:
    """One row a rule, with all the optimizers that share it."""
    names: dict[Rule, list[str]] = {}
    for name in sorted(rules):
        names.setdefault(rules[name], []).append(name)
    return [[", ".join(several), *parts(rule)] for rule, several in names.items()]


def _reasons(rules: Mapping[str, Rule]) -> list[list[str]]:
    names: dict[str, list[str]] = {}
    for name in sorted(rules):
        names.setdefault(parts(rules[name])[0].removeprefix("None: ").rstrip("."), []).append(name)
    return [[why, ", ".join(several)] for why, several in names.items()]


def live(progress: Progress) -> Table:
    """Run every case; r over the second half."""
    head = ["optimizer", "settings", "mean r ± sd", f"within {BAND[0]}–{BAND[1]}", "last loss", "held by the test"]
    rows = []
    for name in progress.over(list(CASES)):
        trail = run(CASES[name])
        row = [name, _settings(CASES[name]), f"{trail.mean:.3f} ± {trail.sd:.3f}", f"{trail.within_band:.0%}"]
        rows.append([*row, f"{trail.loss:.1e}", "yes" if CASES[name].banded else "as measured"])
    return Table("live", head, rows)


def _settings(case: Live) -> str:
    options: dict[str, Any] = {"lr": case.lr, **dict(case.options)}
    return ", ".join(f"{key}={value}" for key, value in options.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.limits.thresholds_page", description=__doc__)
    parser.add_argument("--formulas", action="store_true", help="leave the table of runs alone")
    torch.set_num_threads(1)
    tables = formulas()
    if not parser.parse_args().formulas:
        tables.append(live(Progress("live edges")))
    write(tables, PAGE)


if __name__ == "__main__":
    main()
