"""Instabilities that the nonlinearity of the loss holds back."""

from __future__ import annotations

from eos_monitor.verdicts.edge_history import EdgeHistory
from eos_monitor.verdicts.oscillation import Oscillation

_WATCHED = 32  # steps beyond the edge before an instability is called restrained
_LASTS = 128  # steps without its signs until it is over


class Restraint:
    """Whether a run is beyond its edge and stays bounded: the rule of ``RESTRAINED``, and its memory.

    Attributes:
        beyond_since: Step of the first reading clearly above 1; None outside of that.
        seen_at: Last step with signs of a restrained instability, while it lasts; None outside of one.
    """

    def __init__(self) -> None:
        self.beyond_since: int | None = None
        self.seen_at: int | None = None

    def judge(self, step: int, edge: EdgeHistory, oscillation: Oscillation) -> str | None:
        """Return why the run counts as restrained at ``step``; None if it does not.

        Args:
            step: Optimizer step.
            edge: Readings so far, at least one.
            oscillation: Updates so far.
        """
        if edge.beyond[-1]:
            self.beyond_since = step if self.beyond_since is None else self.beyond_since
        period = oscillation.period
        watched = self.beyond_since is not None and step - self.beyond_since >= _WATCHED
        above = sum(edge.beyond[-4:]) >= 2 or edge.rises >= 2
        if period is not None or (watched and above and oscillation.moving):
            self.seen_at = step
        elif self.seen_at is not None:
            # Its signs need not all be there all the time.
            if any(edge.beyond[-8:]) or edge.rises:
                self.seen_at = max(self.seen_at, edge.entries[-1].step)
            if step - self.seen_at >= _LASTS:
                self.seen_at = None
                self.beyond_since = None
        if self.seen_at is None:
            return None
        if period is not None:
            return f"The updates repeat with period {period}."
        return "The edge ratio is or was above 1, and the nonlinearity of the loss holds the instability back."
