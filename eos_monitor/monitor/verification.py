"""Check that a reading changed nothing, and stop measuring if one did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from eos_monitor.isolation.fingerprint import Fingerprint
from eos_monitor.monitor.engine import Engine
from eos_monitor.readings.guard import MEASURING, VERIFYING
from eos_monitor.readings.reading import Measurement

_NAMED = 5


class Verification:
    """Compares fingerprints of the run from before and after a reading.

    What a reading changed behind an object that the sandbox cannot copy is found and named; it cannot be put back.

    Args:
        when: ``"first"``, ``"always"`` or False.

    Raises:
        ValueError: If ``when`` is something else.
    """

    def __init__(self, when: str | bool) -> None:
        check_verify(when)
        self._when = when
        self._done = when is False

    def around(
        self,
        look: Callable[[], Fingerprint],
        engine: Engine,
        say: Callable[[str], None],
        measure: Callable[[], Measurement | None],
    ) -> Measurement | None:
        """Measure; what that changed is told in one warning, and switches the engine off, on every process.

        Args:
            look: Takes the fingerprint of the run.
            engine: The engine that measures.
            say: Called with what cannot be compared, in words.
            measure: Takes the reading.
        """
        if self._done:
            return measure()
        began = time.perf_counter()
        before = engine.guard.run(VERIFYING, look, gives_up=False)
        measurement = measure()
        after = None if before is None else engine.guard.run(VERIFYING, look, gives_up=False)
        changes = before.changes(after) if before is not None and after is not None else []
        if measurement is not None and self._when == "always":
            # What the next one will cost, too.
            reading = replace(measurement.reading, seconds=time.perf_counter() - began)
            measurement = replace(measurement, reading=reading)
        if self._when == "first" and measurement is not None and measurement.reading.ready:
            self._done = True
            if before is not None and before.uncovered:
                say(f"too large or too deep to be compared around a reading: {_listed(list(before.uncovered))}")
        self._judge(changes, engine)
        return measurement

    def _judge(self, changes: list[str], engine: Engine) -> None:
        # One that stopped alone would leave the others waiting in the next reading.
        (found,) = engine.ranks.total(float(bool(changes)))
        if not found:
            return
        self._done = True
        what = _listed([f"{place} changed" for place in changes]) if changes else "something changed on another process"
        why = (
            f"A reading ran the loss and {what}: that is out of the sandbox's reach, and stays as it is now. Pass a "
            "loss_fn (or define curvature_loss) that leaves it alone, or verify=False if it does not matter."
        )
        if engine.off is None:
            engine.guard.turn_off(MEASURING, why)
        else:
            engine.guard.warn_once("verify", f"eos_monitor: {why}")  # it may be why the products were wrong


def check_verify(when: str | bool) -> None:
    """Check the ``verify=`` argument.

    Raises:
        ValueError: If it is neither ``"first"`` nor ``"always"`` nor False.
    """
    if when is not False and when not in ("first", "always"):
        raise ValueError(f"Expected `verify` to be 'first', 'always' or False, got {when!r}.")


def _listed(places: list[str]) -> str:
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return ", ".join(places[:_NAMED]) + more
