"""How many alerts go out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from eos_monitor.alerts.alert import Alert


class Throttle:
    """Limit on the alerts that go out: not the same change over and over, and never many at once.

    A change of verdict that went out already is held back for ``cooldown`` seconds, unless it is to a worse verdict
    than any since. At most ``per_minute`` go out in a minute. What was held back is counted for :meth:`summary`.

    Args:
        cooldown: Seconds, ≥ 0.
        per_minute: Alerts a minute, ≥ 1.
        clock: Wall-clock seconds, which mean the same after a resume.
    """

    def __init__(self, cooldown: float = 60.0, per_minute: int = 10, clock: Callable[[], float] = time.time) -> None:
        if cooldown < 0.0 or per_minute < 1:
            raise ValueError(f"Expected `cooldown` >= 0 and `per_minute` >= 1, got {cooldown} and {per_minute}.")
        self._cooldown = cooldown
        self._per_minute = per_minute
        self._clock = clock
        self._last: dict[str, float] = {}  # kind of change -> when it went out
        self._recent: deque[tuple[float, int]] = deque()  # when, and how bad
        self._counts: dict[str, int] = {}
        self.held_back = 0

    def passes(self, alert: Alert) -> bool:
        """Whether ``alert`` goes out now."""
        now = self._clock()
        kind = alert.kind
        self._counts[kind] = self._counts.get(kind, 0) + 1
        while self._recent and now - self._recent[0][0] >= max(60.0, self._cooldown):
            self._recent.popleft()
        worst = max((bad for when, bad in self._recent if now - when < self._cooldown), default=-2)
        repeated = kind in self._last and now - self._last[kind] < self._cooldown
        crowded = sum(now - when < 60.0 for when, _ in self._recent) >= self._per_minute
        if (repeated and int(alert.verdict) <= worst) or crowded:
            self.held_back += 1
            return False
        self._last[kind] = now
        self._recent.append((now, int(alert.verdict)))
        return True

    def summary(self) -> str | None:
        """Return all changes with their counts, in words; None if there were none."""
        if not self._counts:
            return None
        counts = ", ".join(f"{count} × {kind}" for kind, count in self._counts.items())
        held = f"; {self.held_back} not sent one by one" if self.held_back else ""
        return f"alerts of this run: {counts}{held}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        return {
            "last": dict(self._last),
            "recent": [list(entry) for entry in self._recent],
            "counts": dict(self._counts),
            "held_back": self.held_back,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._last = dict(state["last"])
        self._counts = dict(state["counts"])
        self._recent = deque((when, bad) for when, bad in state["recent"])
        self.held_back = state["held_back"]
