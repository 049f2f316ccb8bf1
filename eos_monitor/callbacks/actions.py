"""What a monitor does about an instability, if it is asked to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from eos_monitor.alerts.alert import Alert
from eos_monitor.callbacks.outputs import RunOutputs, group_names
from eos_monitor.callbacks.rate_factors import RateFactors
from eos_monitor.callbacks.snapshots import Snapshot, Snapshots
from eos_monitor.forecast.lr_governor import Cap, LrGovernor
from eos_monitor.forecast.tracked_reading import TrackedReading
from eos_monitor.limits.thresholds import learning_rates
from eos_monitor.monitor.engine import Engine
from eos_monitor.readings.guard import Attempts
from eos_monitor.readings.reading import Measurement
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.detector import Verdict
from eos_monitor.verdicts.steps import LOT

NAMES = ("stop", "checkpoint", "cap-lr", "restore")
_REMEMBERED = 100  # actions that go into a checkpoint


class Actions:
    """Acts on a run, or says what it would have done.

    All decisions follow from what every process knows alike: settings, readings, and losses that are means over all.

    Args:
        names: What may be done, of :data:`NAMES`.
        dry_run: Only say so.
        target: See :class:`LrGovernor`, as the two that follow.
        floor: Smallest factor on a learning rate.
        cooldown: Steps.
        snapshot_every: Steps between the states that are kept for ``"restore"``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        dry_run: bool = True,
        target: float | None = None,
        floor: float = 1e-3,
        cooldown: int = 64,
        snapshot_every: int = 32,
    ) -> None:
        if isinstance(names, str) or not set(names) <= set(NAMES):
            raise ValueError(f"Expected `actions` to be a sequence of {NAMES}, got {names!r}.")
        self.names, self.dry_run = frozenset(names), dry_run
        self._governor = LrGovernor(target, floor, cooldown)
        self._every = snapshot_every
        self._snapshots = Snapshots(snapshot_every)
        self._rates = RateFactors()
        self._attempts = Attempts("acting")
        self._save: tuple[int, str] | None = None  # a checkpoint that is to be written: when it came up, and why
        self._diverged: Change | None = None  # what is still to be answered
        self._done: list[dict[str, Any]] = []
        self.released = False
        self._active = False

    # ------------------------------------------------------------------ what users read

    @property
    def done(self) -> list[dict[str, Any]]:
        """What was done, or would have been, oldest first."""
        return list(self._done)

    @property
    def factors(self) -> tuple[float, ...]:
        """Factor on the learning rate of each group."""
        return self._rates.factors

    def release(self) -> None:
        """Give all learning rates back to the schedule, and do nothing more in this run."""
        self.released = True
        self._governor.release()
        self._rates.factors = ()
        self._save = self._diverged = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        return {"governor": self._governor.state_dict(), "done": self.done[-_REMEMBERED:], "released": self.released}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; states to go back to are kept anew."""
        self._governor.load_state_dict(state["governor"])
        self._done, self.released = list(state["done"]), state["released"]

    # ------------------------------------------------------------------ called by the monitor

    def begin(self, trainer: Any, pl_module: Any, engine: Engine, outputs: RunOutputs) -> None:
        """Start to follow a fit."""
        self._active = bool(self.names)
        if not self._active:
            return
        self._trainer, self._module, self._engine, self._outputs = trainer, pl_module, engine, outputs
        known_late = engine.ranks.size > 1 or any(p.device.type != "cpu" for p in pl_module.parameters())
        self._snapshots = Snapshots(self._every, LOT if known_late else 0)
        if not self.dry_run:
            try:
                self._rates.attach(trainer.optimizers)
            except AttributeError:
                kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
                self._attempts.turn_off(f"Expected torch optimizers with step hooks, got {kinds}.")
            else:
                self._use_factors()

    def end(self) -> None:
        """Leave the optimizers as they were found."""
        self._active = False
        self._rates.detach()

    def noticed(self, change: Change) -> None:
        """Take in a change of verdict or advisory, to be answered before the next step."""
        if not self._acting:
            return
        diverged = change.advisory is None and change.verdict is Verdict.DIVERGING
        if diverged:
            self._diverged = change
        if "checkpoint" in self.names and (diverged or change.advisory == "jump-risk"):
            self._save = (change.step, "diverging" if diverged else "jump-risk")

    def before_step(self, step: int, followed: TrackedReading) -> TrackedReading:
        """Answer what was noticed; return the reading that is followed from now on."""
        if not self._acting:
            return followed
        if self._save is not None:
            self._attempts.run(lambda: self._checkpoint(step))
            self._save = None
        change, self._diverged = self._diverged, None
        if change is not None:
            restored = self._attempts.run(lambda: self._answer(step, change))
            return followed if restored is None else restored
        return followed

    def keep(self, step: int, followed: TrackedReading) -> None:
        """Keep a state to go back to if that is due; after the reading of ``step``, if there is one."""
        if not self._acting or "restore" not in self.names or self.dry_run:
            return
        out = self._engine.detector.out_since is not None or self._engine.verdict is Verdict.DIVERGING
        if not out and self._snapshots.due(step):
            beside = (self._engine.detector.state_dict(), followed, self._governor.caps)
            self._attempts.run(
                lambda: self._snapshots.keep(Snapshot.of(step, self._module, self._trainer.optimizers, beside))
            )

    def measured(self, measurement: Measurement | None) -> None:
        """Take in a reading."""
        if self._acting:
            self._attempts.run(lambda: self._governor.measured(measurement, self._trainer.optimizers))

    def before_update(self, step: int, followed: TrackedReading) -> None:
        """Decide on the learning rates of the update of ``step``; to be called once a step."""
        if self._acting and self.names & {"cap-lr", "restore"}:
            self._attempts.run(lambda: self._govern(step, followed))

    def now(self, optimizer: Any) -> None:
        """Take in that the update of ``optimizer`` comes next."""
        self._rates.now(optimizer)

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """Show the learning rates that the update uses."""
        with self._rates.applied():
            yield

    def ahead(self, settings: Any) -> Any:
        """Return settings of the schedule with the present factors on them."""
        return self._rates.scaled(settings)

    # ------------------------------------------------------------------ inside

    @property
    def _acting(self) -> bool:
        return self._active and not self.released and self._attempts.off is None

    def _govern(self, step: int, followed: TrackedReading) -> None:
        optimizers = self._trainer.optimizers
        rates = learning_rates(optimizers)
        if "cap-lr" in self.names:
            plain, exact = self._governor.ratio(rates), followed.edge_ratio(optimizers)
            correction = 1.0 if exact is None or plain is None else exact / plain
            cap = self._governor.decide(step, rates, correction)
            if cap is not None:
                self._tell(step, "cap-lr", self._words(cap), lr=cap.before, to=cap.after, edge_ratio=cap.ratio)
        self._use_factors()

    def _use_factors(self) -> None:
        self._rates.factors = () if self.dry_run or self.released else self._governor.factors

    def _words(self, cap: Cap) -> str:
        names = group_names(self._trainer.optimizers)
        many = len(cap.before) > 1
        changes = ", ".join(
            f"{names[g] + ' ' if many and g < len(names) else ''}{cap.before[g]:.3g} → {cap.after[g]:.3g}"
            for g in cap.groups
        )
        verb = "would have lowered" if self.dry_run else "lowered"
        why = "" if cap.ratio is None else f", because the schedule's edge ratio would be {cap.ratio:.3g}"
        aim = "" if cap.target is None else f"; aimed at {cap.target:.3g}"
        return f"{verb} lr {changes}{why}{aim}"

    def _checkpoint(self, step: int) -> None:
        assert self._save is not None
        came_up, why = self._save
        name = f"{self._outputs.name}_{why}_step{step}.ckpt"
        folder = self._outputs.shared_folder
        if self.dry_run:
            self._tell(step, "checkpoint", f"would have saved {name}", noticed=came_up)
        elif folder is None:
            self._tell(step, "checkpoint", "saved no checkpoint: a fast_dev_run leaves no files", noticed=came_up)
        else:
            self._trainer.save_checkpoint(folder / name)
            self._tell(step, "checkpoint", f"saved {folder / name}", noticed=came_up, path=str(folder / name))

    def _answer(self, step: int, change: Change) -> TrackedReading | None:
        """Go back to before the excursion, or stop."""
        began = change.step - (self._engine.detector.lateness or 0)
        if "restore" in self.names:
            if self.dry_run:
                self._tell(step, "restore", f"would have gone back to a state from before step {began}", to_step=None)
            elif self._governor.exhausted:
                self._tell(step, "restore", "did not go back: the learning rates are at their floor", to_step=None)
            else:
                snapshot = self._snapshots.before(began)
                if self._everywhere(snapshot is not None) and snapshot is not None:
                    return self._restore(step, snapshot)
                self._tell(step, "restore", f"did not go back: no state from before step {began} is kept", to_step=None)
        if "stop" in self.names:
            self._tell(step, "stop", "would have stopped the run" if self.dry_run else "stopped the run")
            if not self.dry_run:
                self._trainer.should_stop = True
        return None

    def _restore(self, step: int, snapshot: Snapshot) -> TrackedReading:
        optimizers = self._trainer.optimizers
        restored: TrackedReading
        snapshot.restore(self._module, optimizers)
        detector, restored, caps = snapshot.beside
        # The losses since belong to a run that is given up; the next ones are compared with those before.
        self._engine.detector.load_state_dict(detector)
        self._engine.verdicts.append((step, self._engine.verdict))
        self._governor.measured(restored.measurement, optimizers)
        cap = self._governor.lower(step, learning_rates(optimizers), caps)
        self._use_factors()
        lower = self._words(cap)
        self._tell(
            step,
            "restore",
            f"went back to the state of step {snapshot.step} (the data and the schedule go on), and {lower}",
            to_step=snapshot.step,
            lr=cap.before,
            to=cap.after,
            edge_ratio=cap.ratio,
        )
        return restored

    def _everywhere(self, here: bool) -> bool:
        """Whether it is so on all processes; one that acted alone would train another model than the rest."""
        ranks = self._engine.ranks
        return here if ranks.sum is None else float(ranks.sum(torch.tensor([float(here)]))[0]) == ranks.size

    def _tell(self, step: int, action: str, words: str, **details: Any) -> None:
        row = {"run": self._engine.run_id, "step": step, "action": action, "dry_run": self.dry_run, "message": words}
        row |= {key: list(value) if isinstance(value, tuple) else value for key, value in details.items()}
        self._done.append(row)
        verdict = self._engine.verdict
        self._outputs.action(Alert(step, verdict, verdict, f"step {step}: {words} [{action}]", action), row)
