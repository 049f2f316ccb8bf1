"""A change of what a run is doing."""

from __future__ import annotations

from dataclasses import dataclass

from eos_monitor.verdicts.detector import Verdict


@dataclass(frozen=True)
class Change:
    """A new verdict, or a new advisory beside it.

    Attributes:
        step: Optimizer step.
        verdict: What the run is doing now.
        previous: What it was doing before.
        advisory: What to look out for; None where only the verdict is new.
        reason: The change in words.
    """

    step: int
    verdict: Verdict
    previous: Verdict
    advisory: str | None
    reason: str
