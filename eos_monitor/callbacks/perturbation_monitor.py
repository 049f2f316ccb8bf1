"""The twin-run monitor for Lightning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor

from eos_monitor.callbacks.attached_monitor import AttachedMonitor
from eos_monitor.callbacks.losses import GivenLoss
from eos_monitor.callbacks.observer import WatchedFit
from eos_monitor.callbacks.reading_context import ReadingContext
from eos_monitor.forecast.lookahead import Settings
from eos_monitor.isolation.parted_loss import NEEDS_ONE_LOSS, PartedLoss
from eos_monitor.perturbation import AMPLIFYING, ATTENUATING, DEAD, DIVERGED, NEUTRAL, TwinRun, twin_run
from eos_monitor.readings.settings import Probe, Solver, names_moved_arguments
from eos_monitor.verdicts.detector import Verdict

_NUMBERS = {DEAD: -2.0, ATTENUATING: -1.0, NEUTRAL: 0.0, AMPLIFYING: 1.0, DIVERGED: 2.0}
_PERTURBATIONS = ("last-bit", "random", "mode")


class PerturbationMonitor(AttachedMonitor):
    """Show whether a run amplifies perturbations: two copies of it go on side by side, one perturbed.

    It measures when an :class:`EdgeOfStabilityMonitor` among the callbacks does, on the same probe and out of the same
    budget; where there is none it brings one that writes nothing. Both copies start from the present state of module
    and optimizer, with the learning rates that the schedulers will set; the run itself is not changed. A reading costs
    2 · ``steps`` forward and backward passes, so it is taken at the first reading from each of ``at_steps`` on, and
    each time the verdict becomes RESTRAINED.

    ============================  =========================================================================
    key                           meaning
    ============================  =========================================================================
    ``perturbation/gain``         growth of the distance of the copies, from the first step at which they differ
    ``perturbation/rate``         growth of its logarithm per step, until it saturates
    ``perturbation/relative_l1``  RelL1 of the copies after the last step, in [0, 2]
    ``perturbation/verdict``      −2 dead, −1 attenuating, 0 neutral, 1 amplifying, 2 diverged
    ============================  =========================================================================

    Rows also go to ``perturbation_readings.jsonl`` in the log folder. With several processes the first one measures,
    on its own share of the probe and without the mean over gradients: it is the noisier run of one process. A net with
    synchronized batch normalization, or a loss that exchanges between processes, is then left out.

    Args:
        at_steps: Steps at which to measure.
        on_restrained: Whether to measure when the verdict becomes RESTRAINED.
        steps: Steps that the copies take, ≥ 1.
        perturbation: ``"last-bit"``, ``"random"``, or ``"mode"`` for the critical mode of the reading; see
            :func:`eos_monitor.perturbation.twin_run`.
        k: Factor of ``"last-bit"``, > 0; powers of two do nothing.
        every_n_steps: As for :class:`EdgeOfStabilityMonitor`, like all that follow; not used where one is attached.
        max_overhead: Share of the training time that readings may take.
        loss_fn: ``loss_fn(pl_module, batch)`` -> scalar mean loss.
        probe: The data to measure on, a :class:`Probe`, or what stands for one.
        solver: How readings are solved, a :class:`Solver`.
        enabled: Switch; the environment variable ``EOS_MONITOR=off`` switches every monitor off.
        name: First part of the log keys and file names.

    Raises:
        ValueError: If an argument is out of range.

    References:
        A PDE-based explanation of extreme numerical sensitivities and edge of stability (arXiv 2206.02001), §4.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[PerturbationMonitor(at_steps=[1000])], logger=False)  # doctest: +SKIP
        >>> trainer.fit(module, loader)  # doctest: +SKIP
        >>> print(trainer.callbacks[0].runs[1000])  # doctest: +SKIP
    """

    @names_moved_arguments
    def __init__(
        self,
        at_steps: Sequence[int] = (),
        on_restrained: bool = True,
        steps: int = 64,
        perturbation: Literal["last-bit", "random", "mode"] = "last-bit",
        k: float = 3.0,
        every_n_steps: int | None = None,
        max_overhead: float = 0.05,
        loss_fn: GivenLoss | None = None,
        probe: Probe | str | Iterable[Any] = "fixed",
        solver: Solver | None = None,
        enabled: bool = True,
        name: str = "perturbation",
    ) -> None:
        if perturbation not in _PERTURBATIONS:
            raise ValueError(f"Expected `perturbation` to be one of {_PERTURBATIONS}, got {perturbation!r}.")
        if steps < 1 or any(step < 0 for step in at_steps):
            raise ValueError(f"Expected `steps` >= 1 and `at_steps` >= 0, got {steps} and {list(at_steps)}.")
        if not (math.isfinite(k) and k > 0.0):
            raise ValueError(f"Expected a finite `k` > 0, got {k}.")
        super().__init__(
            name=name,
            enabled=enabled,
            settings={
                "every_n_steps": every_n_steps,
                "max_overhead": max_overhead,
                "loss_fn": loss_fn,
                "probe": probe,
                "solver": solver,
            },
        )
        self._at_steps = sorted(at_steps)
        self._on_restrained = on_restrained
        self._steps = steps
        self._perturbation = perturbation
        self._k = k
        self._seed = (solver or Solver()).seed
        self.runs: dict[int, TwinRun] = {}  # by the step that they started from
        self._done = -1  # the last step at which one was due and taken
        self._restrained = False  # whether the verdict was RESTRAINED at the last reading
        self._fresh: TwinRun | None = None  # what is not written yet

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the host, or bring it; a checkpoint is loaded after this."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._done = -1
            self._restrained = False

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured when, as plain Python values."""
        return super().state_dict() | {"done": self._done, "restrained": self._restrained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self._done = state_dict["done"]
        self._restrained = state_dict["restrained"]

    # ------------------------------------------------------------------ on the monitor's readings

    def begin(self, fit: WatchedFit) -> None:
        """Start afresh for a new fit; say so where nothing can be measured."""
        super().begin(fit)
        self.turn_off_if_synchronized(fit.trainer)
        self.runs = {}
        self._fresh = None

    def measure(self, context: ReadingContext) -> None:
        """Let two copies go on, if that is due."""
        self._fresh = None
        restrained = context.verdict is Verdict.RESTRAINED
        turned = restrained and not self._restrained and self._on_restrained
        if not turned and not any(self._done < step <= context.step for step in self._at_steps):
            self._restrained = restrained
            return
        if self._perturbation == "mode" and context.modes is None:
            return  # the next reading may have one
        self._done = context.step
        self._restrained = restrained
        if not context.trainer.is_global_zero:
            return
        if isinstance(context.loss_fn, PartedLoss):
            self.turn_off(NEEDS_ONE_LOSS)
            return
        perturbation: str | Tensor = self._perturbation
        if self._perturbation == "mode" and context.modes is not None:
            perturbation = context.modes[:, 0]
        self._fresh = self.runs[context.step] = self._run_twins(context, perturbation)

    def _run_twins(self, context: ReadingContext, perturbation: str | Tensor) -> TwinRun:
        optimizers = context.optimizers
        return twin_run(
            context.pl_module,
            context.loss_fn,
            context.batches,
            optimizers,
            steps=self._steps,
            perturbation=perturbation,
            k=self._k,
            settings=_settings_of(optimizers, [context.ahead(n) for n in range(self._steps)]),
            sandbox=context.sandbox(),
            seed=self._seed,
        )

    def write(self, step: int, verdict: Verdict) -> None:
        """Write what was measured at ``step``."""
        run = self._fresh
        self._fresh = None
        if run is None:
            return
        found = {"gain": run.gain[-1], "rate": run.rate, "relative_l1": run.relative_l1[-1]}
        metrics = {f"{self.name}/{key}": value for key, value in found.items() if value is not None}
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        metrics[f"{self.name}/verdict"] = _NUMBERS[run.verdict]
        kind = {"perturbation": self._perturbation, "host_verdict": verdict.name}
        self._outputs.row({"run": self._run_id, "step": step} | kind | asdict(run), metrics)
        self._outputs.say(f"step {step}: twin runs, perturbed by {self._perturbation}: {run}")


def _settings_of(
    optimizers: Sequence[Any], ahead: Sequence[Settings | None]
) -> list[list[list[Mapping[str, Any]]]] | None:
    """Return what each group has at each of the steps; from the last one known on it stays; None if none is known.

    What is known of a step says what differs from now, and the copies keep what they were given the step before: each
    step gets every key that changes at any.
    """
    known = [settings for settings in ahead if settings is not None]
    if not known:
        return None
    steps: list[list[list[Mapping[str, Any]]]] = []
    for settings in known:
        groups: list[list[Mapping[str, Any]]] = []
        for o, optimizer in enumerate(optimizers):
            changing = [{key for there in known for key in there[o][g]} for g in range(len(optimizer.param_groups))]
            groups.append(
                [
                    {key: changes.get(key, group.get(key)) for key in keys - {"steps_ahead"}}
                    for keys, changes, group in zip(changing, settings[o], optimizer.param_groups, strict=True)
                ]
            )
        steps.append(groups)
    return steps + [steps[-1]] * (len(ahead) - len(steps))
