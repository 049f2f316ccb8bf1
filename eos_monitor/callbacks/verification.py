"""Check that a reading changed nothing, and stop measuring if one did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from eos_monitor.isolation.fingerprint import Fingerprint, fingerprint
from eos_monitor.monitor.engine import Engine
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
        if when is not False and when not in ("first", "always"):
            raise ValueError(f"Expected `verify` to be 'first', 'always' or False, got {when!r}.")
        self._when, self._done = when, when is False

    def around(
        self,
        look: Callable[[], Fingerprint],
        engine: Engine,
        say: Callable[[str], None],
        measure: Callable[[], Measurement | None],
    ) -> Measurement | None:
        """Measure; what that changed is told in one warning, and switches the engine off, on every process."""
        if self._done:
            return measure()
        began = time.perf_counter()
        before = _attempt(look, engine)
        measurement = measure()
        after = _attempt(look, engine) if before is not None else None
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
        found = float(bool(changes))
        if engine.ranks.sum is not None:
            # One that stopped alone would leave the others waiting in the next reading.
            found = float(engine.ranks.sum(torch.tensor([found]))[0])
        if not found:
            return
        self._done = True
        what = _listed([f"{place} changed" for place in changes]) if changes else "something changed on another process"
        why = (
            f"A reading ran the loss and {what}: that is out of the sandbox's reach, and stays as it is now. Pass a "
            "loss_fn (or define curvature_loss) that leaves it alone, or verify=False if it does not matter."
        )
        if engine.off is None:
            engine.turn_off(why)
        else:
            engine.warn_once("verify", f"eos_monitor: {why}")  # it may be why the products were wrong


def run_fingerprint(trainer: Any, pl_module: Any, *, leave_out: tuple[Any, ...]) -> Fingerprint:
    """Look at everything that a reading could reach in a Trainer's run."""
    schedulers = {f"lr_schedulers[{i}]": config.scheduler for i, config in enumerate(trainer.lr_scheduler_configs)}
    return fingerprint(pl_module, trainer.optimizers, also=schedulers, leave_out=(trainer, *leave_out))


def _attempt(look: Callable[[], Fingerprint], engine: Engine) -> Fingerprint | None:
    try:
        return look()
    except Exception as error:
        engine.warn_once("look", f"eos_monitor could not verify a reading. {type(error).__name__}: {error}")
        return None


def _listed(places: list[str]) -> str:
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return ", ".join(places[:_NAMED]) + more
