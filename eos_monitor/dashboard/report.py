"""The run in a few sentences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_FEW_CHANGES = 6


def run_report(
    rows: Sequence[Mapping[str, Any]],
    verdicts: Sequence[tuple[int, str]],
    overhead: float | None = None,
    *,
    last_step: int | None = None,
    reason: str | None = None,
) -> str:
    """Tell what was measured, from plain rows.

    Args:
        rows: Readings, oldest first.
        verdicts: ``(step, verdict)``, one entry a change.
        overhead: Time spent as a share of the training time.
        last_step: Step at which the run ended; by default that of the last reading.
        reason: The last verdict in words.
    """
    if not rows:
        return "No reading was taken."
    span = f"steps {rows[0]['step']} to {rows[-1]['step']}" if len(rows) > 1 else f"at step {rows[0]['step']}"
    lines = [f"{_count(len(rows))}, {span}."]
    measured = [row for row in rows if row.get("edge_ratio") is not None]
    if measured:
        lines.append(_edge_sentence(measured))
    else:
        lines.append("None of them has an edge ratio.")
    if verdicts:
        lines.append(_verdict_sentence(list(dict(verdicts).items()), last_step or rows[-1]["step"], reason))
    if not all(row["full_batch"] for row in rows):
        lines.append(
            "Trained on minibatches: instability can come before an edge ratio of 1, so a small ratio does not say "
            "that the run is stable."
        )
    lines.append(_cost_sentence(rows, overhead))
    notes = dict.fromkeys(note for row in rows for note in row["notes"])
    return "\n".join([*lines, *(f"Note: {note}." for note in notes)])


def _verdict_sentence(changes: Sequence[tuple[int, str]], last_step: int, reason: str | None) -> str:
    """Tell each change where they are few, and the share of the steps that each verdict had."""
    steps = [step for step, _ in changes] + [max(last_step, changes[-1][0])]
    held: dict[str, int] = {}
    for (start, verdict), end in zip(changes, steps[1:], strict=True):
        held[verdict] = held.get(verdict, 0) + end - start
    if len(changes) <= _FEW_CHANGES:
        sentence = "Verdicts: " + ", ".join(f"{verdict} from step {step}" for step, verdict in changes)
    else:
        sentence = f"The verdict changed {len(changes) - 1} times and ended as {changes[-1][1]}"
    total = sum(held.values())
    if len(held) > 1 and total:
        shares = sorted(held.items(), key=lambda item: -item[1])
        sentence += "; of the steps " + ", ".join(f"{n / total:.0%} {verdict}" for verdict, n in shares)
    return sentence + (f". At the end: {reason}" if reason else ".")


def _edge_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    last = rows[-1]
    top = max(rows, key=lambda row: float(row["edge_ratio"]))
    course = f"Edge ratio {first['edge_ratio']:.3g} at step {first['step']}"
    if len(rows) > 1:
        course += (
            f", {last['edge_ratio']:.3g} at step {last['step']}; highest {top['edge_ratio']:.3g} at step {top['step']}"
        )
    sentence = f"{course} (1 is the full-batch edge)."
    if last["edge_lr"] is not None and last["full_batch"]:
        rates = ", ".join(f"{value:.3g}" for value in last["edge_lr"])
        sentence += f" At the end the edge was at lr {rates}."
    poor = sum(not row["converged"] for row in rows)
    return sentence + (f" {_count(poor)} did not converge." if poor else "")


def _count(readings: int) -> str:
    return f"{readings} reading{'' if readings == 1 else 's'}"


def _cost_sentence(rows: Sequence[Mapping[str, Any]], overhead: float | None) -> str:
    seconds = sum(row["seconds"] for row in rows)
    sentence = f"Cost: {seconds:.3g} s in readings"
    products = [row["matvecs"] for row in rows if row["matvecs"]]
    if products:
        sentence += f", median {statistics.median(products):g} products each"
    return sentence + (f", {overhead:.1%} of the training time." if overhead is not None else ".")
