"""Messages about a change of verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eos_monitor.stability.detector import Verdict
from eos_monitor.stability.reading import StabilityReading


@dataclass(frozen=True)
class Alert:
    """A change of verdict.

    Attributes:
        step: Optimizer step.
        verdict: What the run is doing now.
        previous: What it was doing before.
        message: The change in plain words, with the numbers behind it.
    """

    step: int
    verdict: Verdict
    previous: Verdict
    message: str

    @property
    def kind(self) -> str:
        """What changed, in two words."""
        return f"{self.previous.name} to {self.verdict.name}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "step": self.step,
            "verdict": self.verdict.name,
            "previous": self.previous.name,
            "message": self.message,
        }


def alert_of(
    step: int, verdict: Verdict, previous: Verdict, reading: StabilityReading | None, loss: float | None
) -> Alert:
    """Word the change from ``previous`` to ``verdict``."""
    return Alert(step, verdict, previous, f"step {step}: {_meaning(verdict, reading, loss)} [{verdict.name}]")


def _meaning(verdict: Verdict, reading: StabilityReading | None, loss: float | None) -> str:
    numbers = _numbers(reading)
    if verdict is Verdict.DIVERGING:
        return f"the loss is not finite ({loss}). Restart from an earlier checkpoint at a lower learning rate"
    if verdict is Verdict.EDGE:
        return (
            f"at the full-batch edge of stability ({numbers}). This is where training usually settles; it is no failure"
        )
    if verdict is Verdict.STABLE:
        return f"below the full-batch edge of stability ({numbers})"
    if verdict is Verdict.WARMING_UP:
        return "the optimizer's state is too young to tell its edge"
    if reading is not None and reading.edge_ratio is None:
        return "no edge is known here" + (f": {'; '.join(reading.notes)}" if reading.notes else "")
    if reading is not None and not reading.full_batch:
        return (
            f"below the full-batch edge ({numbers}); under minibatch noise instability comes earlier, so this does not "
            "say that the run is stable"
        )
    return f"near the edge, too close to call ({numbers})"


def _numbers(reading: StabilityReading | None) -> str:
    if reading is None or reading.edge_ratio is None:
        return "no reading yet"
    error = f" ± {reading.error:.2g}" if reading.error is not None else ""
    sharpness = ""
    if reading.normalized_sharpness is not None and reading.threshold is not None:
        sharpness = f"; normalized sharpness {reading.normalized_sharpness:.3g} of {reading.threshold:.3g}"
    return f"edge ratio {reading.edge_ratio:.3g}{error}{sharpness}"
