"""Messages about a change of verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eos_monitor.readings.reading import StabilityReading
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.detector import Verdict

_ADVICE = {
    Verdict.EDGE: "This is where training usually settles; it is no failure.",
    Verdict.RESTRAINED: "This is no failure; a lower learning rate would end it.",
    Verdict.DIVERGING: "Restart from a checkpoint from before it, at a lower learning rate.",
}


@dataclass(frozen=True)
class Alert:
    """A change of verdict, an advisory beside it, or an action.

    Attributes:
        step: Optimizer step.
        verdict: What the run is doing now.
        previous: What it was doing before.
        message: The change in plain words, with the numbers behind it and what to do.
        advisory: ``"jump-risk"`` or ``"loss-excess"``, or the name of an action that was taken; None for a change of
            verdict.
    """

    step: int
    verdict: Verdict
    previous: Verdict
    message: str
    advisory: str | None = None

    @property
    def kind(self) -> str:
        """What changed, in few words."""
        return self.advisory or f"{self.previous.name} to {self.verdict.name}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "step": self.step,
            "verdict": self.verdict.name,
            "previous": self.previous.name,
            "advisory": self.advisory,
            "message": self.message,
        }


def alert_of(change: Change, reading: StabilityReading | None) -> Alert:
    """Word a change, with the numbers of the last reading."""
    label = change.advisory or change.verdict.name
    parts = [f"step {change.step}: {change.reason}", _numbers(reading)]
    if change.advisory is None:
        parts.append(_ADVICE.get(change.verdict, ""))
    message = " ".join(part for part in parts if part)
    return Alert(change.step, change.verdict, change.previous, f"{message} [{label}]", change.advisory)


def _numbers(reading: StabilityReading | None) -> str:
    if reading is None:
        return ""
    if reading.edge_ratio is None:
        return f"({'; '.join(reading.notes)})" if reading.notes else ""
    found = [f"last reading, step {reading.step}: edge ratio {reading.edge_ratio:.3g}"]
    if reading.error is not None:
        found[0] += f" ± {reading.error:.2g}"
    if reading.normalized_sharpness is not None and reading.threshold is not None:
        found.append(f"normalized sharpness {reading.normalized_sharpness:.3g} of {reading.threshold:.3g}")
    if reading.edge_lr is not None and reading.full_batch:
        found.append("full-batch edge at lr " + ", ".join(f"{value:.2g}" for value in reading.edge_lr))
    return f"({'; '.join(found)})"
