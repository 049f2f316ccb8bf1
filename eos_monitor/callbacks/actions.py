"""What may be done about an instability: a callback of its own, so that a monitor has no means of changing a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from eos_monitor.alerts.alert import Alert
from eos_monitor.callbacks.attached_monitor import AttachedMonitor
from eos_monitor.callbacks.observer import WatchedFit
from eos_monitor.callbacks.outputs import RunOutputs
from eos_monitor.callbacks.rate_factors import RateFactors, places_of
from eos_monitor.callbacks.snapshots import Snapshot, Snapshots
from eos_monitor.callbacks.wording import group_names
from eos_monitor.forecast.lookahead import Settings
from eos_monitor.forecast.lr_governor import Cap, LrGovernor
from eos_monitor.forecast.tracked_reading import TrackedReading
from eos_monitor.limits.thresholds import learning_rates
from eos_monitor.readings.reading import Measurement
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.detector import Verdict
from eos_monitor.verdicts.steps import BUFFERED

NAMES = ("stop", "checkpoint", "cap-lr", "restore")
_ACTING = "acting"
_REMEMBERED = 100  # actions that go into a checkpoint


class StabilityActions(AttachedMonitor):
    """Act on a run that becomes unstable, or say what would have been done.

    It goes along with an :class:`EdgeOfStabilityMonitor` among the callbacks; where there is none it brings one that
    writes nothing. All decisions follow from what every process knows alike: settings, readings, and losses that are
    means over all. What is done is a line in the log, an alert, and a row of ``eos_actions.jsonl`` in the log folder.

    ================  ===================================================================================
    action            meaning
    ================  ===================================================================================
    ``"cap-lr"``      on a fast rise of a learning rate, from that step on: keep the edge ratio at ``edge_target``
    ``"checkpoint"``  save one once DIVERGING is confirmed, and at the risk of a jump
    ``"restore"``     once DIVERGING is confirmed: go back to a state from before, at half the learning rates
    ``"stop"``        once DIVERGING is confirmed: end the run; with ``"restore"``, if that cannot be
    ================  ===================================================================================

    Args:
        what: An action, or a sequence of them.
        more: Further actions.
        dry_run: Only say what would have been done.
        edge_target: Edge ratio at which ``"cap-lr"`` aims, > 0; None for half of where jumps of the kind were seen to
            fail, and at most 1.
        lr_floor: Smallest factor on a learning rate, in (0, 1].
        cooldown: Steps until a capped learning rate may rise again, ≥ 1.
        snapshot_every: Steps between the states that are kept, on the CPU, for ``"restore"``, ≥ 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> StabilityActions("cap-lr", "restore").names == StabilityActions(["restore", "cap-lr"]).names
        True
    """

    _writes = "actions"

    # Of one fit: set by _start_afresh.
    _governor: LrGovernor
    _snapshots: Snapshots
    _rates: RateFactors
    _save: tuple[int, str] | None  # a checkpoint that is to be written: when it came up, and why
    _diverged: Change | None  # what is still to be answered
    _done: list[dict[str, Any]]
    _released: bool
    _fit: WatchedFit | None  # while it goes on
    _used: bool  # in a fit

    def __init__(
        self,
        what: str | Sequence[str],
        *more: str,
        dry_run: bool = True,
        edge_target: float | None = None,
        lr_floor: float = 1e-3,
        cooldown: int = 64,
        snapshot_every: int = 32,
    ) -> None:
        names = [what, *more] if isinstance(what, str) else [*what, *more]
        if not names or not set(names) <= set(NAMES):
            raise ValueError(f"Expected actions of {NAMES}, got {names!r}.")
        super().__init__(name="eos", enabled=True, settings={})
        self.names = frozenset(names)
        self.dry_run = dry_run
        self.needs_every_loss = True
        self._governing = (edge_target, lr_floor, cooldown)
        self._every = snapshot_every
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._governor = LrGovernor(*self._governing)
        self._snapshots = Snapshots(self._every)
        self._rates = RateFactors()
        self._save = None
        self._diverged = None
        self._done = []
        self._released = False
        self._fit = None
        self._used = False

    # ------------------------------------------------------------------ what users read

    @property
    def done(self) -> list[dict[str, Any]]:
        """What was done in the last fit, or would have been, oldest first."""
        return list(self._done)

    @property
    def factors(self) -> tuple[float, ...]:
        """Factor on the learning rate of each group; empty for none."""
        return self._rates.factors

    def release(self) -> None:
        """Give all learning rates back to the schedule, and do nothing more about instabilities in this run."""
        self._released = True
        self._governor.release()
        self._rates.factors = ()
        self._save = None
        self._diverged = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values."""
        acted = {"governor": self._governor.state_dict(), "done": self._done[-_REMEMBERED:], "released": self._released}
        return super().state_dict() | acted

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; states to go back to are kept anew."""
        super().load_state_dict(state_dict)
        self._governor.load_state_dict(state_dict["governor"])
        self._done = list(state_dict["done"])
        self._released = state_dict["released"]

    # ------------------------------------------------------------------ through a fit

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the monitor, or bring it; start afresh for a new fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._used:
            self._start_afresh()

    def begin(self, fit: WatchedFit) -> None:
        """Start to follow a fit."""
        super().begin(fit)
        self._used = True
        self._fit = fit
        known_late = fit.engine.ranks.size > 1 or any(p.device.type != "cpu" for p in fit.pl_module.parameters())
        self._snapshots = Snapshots(self._every, BUFFERED if known_late else 0)
        if not self.dry_run:
            try:
                self._rates.attach(fit.optimizers)
            except AttributeError:
                kinds = ", ".join(type(optimizer).__name__ for optimizer in fit.optimizers)
                self.guard.turn_off(_ACTING, f"Expected torch optimizers with step hooks, got {kinds}.")
            else:
                self._use_factors()

    def finish(self, step: int) -> None:
        """Leave the optimizers as they were found."""
        self._fit = None
        self._rates.detach()

    def changed(self, change: Change) -> None:
        """Take in a change of verdict or advisory, to be answered before the next step."""
        if not self._acting:
            return
        diverged = change.advisory is None and change.verdict is Verdict.DIVERGING
        if diverged:
            self._diverged = change
        if "checkpoint" in self.names and (diverged or change.advisory == "jump-risk"):
            self._save = (change.step, "diverging" if diverged else "jump-risk")

    def before_step(self, step: int, tracked: TrackedReading) -> TrackedReading | None:
        """Answer what was noticed; return the reading of a state that was gone back to."""
        fit = self._acting
        if fit is None:
            return None
        if self._save is not None:
            came_up, why = self._save
            self._save = None
            self.guard.run(_ACTING, lambda: self._checkpoint(fit, step, came_up, why), together=True)
        change = self._diverged
        self._diverged = None
        if change is None:
            return None
        return self.guard.run(_ACTING, lambda: self._answer(fit, step, change), together=True)

    def keep(self, step: int, tracked: TrackedReading) -> None:
        """Keep a state to go back to if that is due; after the reading of ``step``, if there is one."""
        fit = self._acting
        if fit is None or "restore" not in self.names or self.dry_run:
            return
        detector = fit.engine.detector
        out = detector.out_since is not None or fit.engine.verdict is Verdict.DIVERGING
        if not out and self._snapshots.due(step):
            beside = (detector.state_dict(), tracked, self._governor.caps_by_place)
            self.guard.run(
                _ACTING,
                lambda: self._snapshots.keep(Snapshot.of(step, fit.pl_module, fit.optimizers, beside)),
            )

    def measured(self, measurement: Measurement) -> None:
        """Take in a reading."""
        fit = self._acting
        if fit is not None:
            self.guard.run(_ACTING, lambda: self._governor.measured(measurement, fit.optimizers), together=True)

    def before_update(self, step: int, tracked: TrackedReading) -> None:
        """Decide on the learning rates of the update of ``step``; once a step."""
        if self._rates.missed and _ACTING not in self.guard.off:
            self._rates.factors = ()
            why = (
                "Expected each step of an optimizer to be announced by on_before_optimizer_step, got one that was not: "
            )
            self.guard.turn_off(_ACTING, why + "it used the schedule's learning rate, whatever was said before.")
        fit = self._acting
        if fit is not None and self.names & {"cap-lr", "restore"}:
            self.guard.run(_ACTING, lambda: self._govern(fit, step, tracked), together=True)

    def before_optimizer_step(self, optimizer: Any) -> None:
        """Take in that the update of ``optimizer`` comes next."""
        self._rates.now(optimizer)

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """Show the learning rates that the update uses."""
        with self._rates.applied():
            yield

    def ahead(self, settings: Settings | None) -> Settings | None:
        """Return settings of the schedule with the present factors on them."""
        return self._rates.scaled(settings)

    def factor(self) -> float | None:
        """Return the factor on the first learning rate; None for none."""
        return self.factors[0] if self.factors else None

    def metrics(self, name: str) -> dict[str, float]:
        """Return the least factor, where there is one."""
        return {f"{name}/lr_factor": min(self.factors)} if self.factors else {}

    # ------------------------------------------------------------------ inside

    @property
    def _acting(self) -> WatchedFit | None:
        return None if self._released or _ACTING in self.guard.off else self._fit

    def _govern(self, fit: WatchedFit, step: int, tracked: TrackedReading) -> None:
        optimizers = fit.optimizers
        rates = learning_rates(optimizers)
        if "cap-lr" in self.names:
            plain = self._governor.ratio(rates)
            exact = tracked.edge_ratio(optimizers)
            correction = 1.0 if exact is None or plain is None else exact / plain
            cap = self._governor.decide(step, rates, correction, places_of(optimizers))
            if cap is not None:
                words = self._words(fit, cap)
                self._tell(fit, step, "cap-lr", words, lr=cap.before, to=cap.after, edge_ratio=cap.ratio)
        self._use_factors()

    def _use_factors(self) -> None:
        self._rates.factors = () if self.dry_run or self._released else self._governor.factors

    def _words(self, fit: WatchedFit, cap: Cap) -> str:
        names = group_names(fit.optimizers)
        many = len(cap.before) > 1
        changes = ", ".join(
            f"{names[g] + ' ' if many and g < len(names) else ''}{cap.before[g]:.3g} → {cap.after[g]:.3g}"
            for g in cap.groups
        )
        verb = "would have lowered" if self.dry_run else "lowered"
        why = "" if cap.ratio is None else f", because the schedule's edge ratio would be {cap.ratio:.3g}"
        aim = "" if cap.target is None else f"; aimed at {cap.target:.3g}"
        return f"{verb} lr {changes}{why}{aim}"

    def _outputs_of(self, fit: WatchedFit) -> RunOutputs:
        """Return the monitor's outputs, or those of its own where the monitor was brought along."""
        return self._outputs if fit.outputs.silent else fit.outputs

    def _checkpoint(self, fit: WatchedFit, step: int, came_up: int, why: str) -> None:
        outputs = self._outputs_of(fit)
        name = f"{outputs.name}_{why}_step{step}.ckpt"
        folder = outputs.shared_folder
        if self.dry_run:
            self._tell(fit, step, "checkpoint", f"would have saved {name}", noticed=came_up)
        elif folder is None:
            words = "saved no checkpoint: a fast_dev_run leaves no files"
            self._tell(fit, step, "checkpoint", words, noticed=came_up)
        else:
            fit.trainer.save_checkpoint(folder / name)
            self._tell(fit, step, "checkpoint", f"saved {folder / name}", noticed=came_up, path=str(folder / name))

    def _answer(self, fit: WatchedFit, step: int, change: Change) -> TrackedReading | None:
        """Go back to before the excursion, or stop."""
        began = change.step - (fit.engine.detector.lateness or 0)
        if "restore" in self.names:
            snapshot = None
            if self.dry_run:
                words = f"would have gone back to a state from before step {began}"
            elif self._governor.exhausted:
                words = "did not go back: the learning rates are at their floor"
            else:
                words = f"did not go back: no state from before step {began} is kept"
                snapshot = self._snapshots.before(began)
                # One process that acted alone would train another model than the rest.
                (kept,) = fit.engine.ranks.total(float(snapshot is not None))
                if snapshot is not None and kept == fit.engine.ranks.size:
                    return self._restore(fit, step, snapshot)
            self._tell(fit, step, "restore", words, to_step=None)
        if "stop" in self.names:
            self._tell(fit, step, "stop", "would have stopped the run" if self.dry_run else "stopped the run")
            if not self.dry_run:
                fit.trainer.should_stop = True
        return None

    def _restore(self, fit: WatchedFit, step: int, snapshot: Snapshot) -> TrackedReading:
        optimizers = fit.optimizers
        engine = fit.engine
        restored: TrackedReading
        snapshot.restore(fit.pl_module, optimizers)
        detector, restored, caps = snapshot.beside
        # The losses since belong to a run that is given up; the next ones are compared with those before.
        engine.detector.load_state_dict(detector)
        engine.verdicts.append((step, engine.verdict))
        self._governor.measured(restored.measurement, optimizers)
        cap = self._governor.lower(step, learning_rates(optimizers), caps, places_of(optimizers))
        self._use_factors()
        self._tell(
            fit,
            step,
            "restore",
            f"went back to the state of step {snapshot.step} (the data and the schedule go on), and "
            f"{self._words(fit, cap)}",
            to_step=snapshot.step,
            lr=cap.before,
            to=cap.after,
            edge_ratio=cap.ratio,
        )
        return restored

    def _tell(self, fit: WatchedFit, step: int, action: str, words: str, **details: Any) -> None:
        engine = fit.engine
        row = {"run": engine.run_id, "step": step, "action": action, "dry_run": self.dry_run, "message": words}
        row |= {key: list(value) if isinstance(value, tuple) else value for key, value in details.items()}
        self._done.append(row)
        message = f"step {step}: {words} [{action}]"
        self._outputs_of(fit).action(Alert(step, engine.verdict, engine.verdict, message, action), row)
