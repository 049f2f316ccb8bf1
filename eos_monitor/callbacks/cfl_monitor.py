"""The layer-wise monitor for Lightning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from eos_monitor.callbacks.attached_monitor import AttachedMonitor
from eos_monitor.callbacks.losses import GivenLoss
from eos_monitor.callbacks.observer import WatchedFit
from eos_monitor.callbacks.reading_context import ReadingContext
from eos_monitor.cfl.capture import NoLayerError, layer_names
from eos_monitor.cfl.estimate import CFLEstimate
from eos_monitor.cfl.tiers import CFLGauge
from eos_monitor.dashboard.layer_history import LayerHistory
from eos_monitor.dashboard.layers import has_something_to_draw, layers_table, run_sentence
from eos_monitor.isolation.parted_loss import NEEDS_ONE_LOSS, PartedLoss
from eos_monitor.limits.thresholds import critical_curvature, learning_rates
from eos_monitor.readings.reading import Measurement, common_factor
from eos_monitor.readings.settings import Probe, Solver, names_moved_arguments
from eos_monitor.verdicts.change import Change
from eos_monitor.verdicts.detector import Verdict

_REFINE_EVERY = 5  # readings between exact tiers, while the verdict stays the same


class CFLMonitor(AttachedMonitor):
    """Show which layer drives a run to its edge: CFL numbers from activation regimes, layer by layer.

    It measures when an :class:`EdgeOfStabilityMonitor` among the callbacks does, on the same probe and out of the same
    budget; where there is none it brings one that writes nothing. A layer's CFL number is its learning rate over the
    one at which it alone would be at its limit. Numbers come from the cheap tier; at every fifth reading, and when the
    verdict has changed, the first three layers and those that the cheap tier is weak on are measured exactly.

    ============================  =========================================================================
    key                           meaning
    ============================  =========================================================================
    ``cfl/<layer>/number``        CFL number; 1 is the layer's own limit
    ``cfl/<layer>/lr_max``        learning rate at that limit
    ``cfl/<layer>/crossings``     times that the number rose above 1: restrained instabilities, as the papers have it
    ``cfl/<layer>/activated``     share of the entries that are activated
    ``cfl/<layer>/transitioning``  share in the bend of the activation; descriptive
    ``cfl/<layer>/not_activated``  share of the rest
    ============================  =========================================================================

    Rows also go to ``cfl_readings.jsonl`` in the log folder; a heat map of layers and steps is drawn at the end of fit,
    and a ranked table is logged when the verdict goes beyond EDGE. With several processes the first one measures, on
    its own share of the probe; a net with synchronized batch normalization, or a loss that exchanges between
    processes, is then left out.

    Args:
        layers: Name patterns (``fnmatch``) of the layers that are wanted; all by default.
        probes: Probes of the loss's curvature at the output, ≥ 1.
        exact: Measure every layer exactly at every reading.
        paper_bound: Add the papers' bound to the rows.
        every_n_steps: As for :class:`EdgeOfStabilityMonitor`, like all that follow; not used where one is attached.
        max_overhead: Share of the training time that readings may take.
        loss_fn: ``loss_fn(pl_module, batch)`` -> scalar mean loss.
        probe: The data to measure on, a :class:`Probe`, or what stands for one.
        solver: How readings are solved, a :class:`Solver`.
        verify: When to compare the run before and after a reading.
        enabled: Switch; the environment variable ``EOS_MONITOR=off`` switches every monitor off.
        name: First part of the log keys and file names.

    Raises:
        ValueError: If an argument is out of range.

    References:
        A PDE-based explanation of extreme numerical sensitivities and edge of stability (arXiv 2206.02001), §5.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[CFLMonitor(layers="net.*")], logger=False)  # doctest: +SKIP
        >>> trainer.fit(module, loader)  # doctest: +SKIP
        >>> print(trainer.callbacks[0].report())  # doctest: +SKIP
    """

    # Of one fit: set by _start_afresh.
    _estimates: list[CFLEstimate]
    _history: LayerHistory
    _order: list[str]  # of the layers in the net
    _measurement: Measurement | None
    _fresh: bool  # whether what was measured is not written yet
    _count: int
    _refined_at: Verdict | None
    _measured_at: int
    _to_tell: Change | None  # what the table is still to be told of

    @names_moved_arguments
    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        probes: int = 4,
        exact: bool = False,
        paper_bound: bool = False,
        every_n_steps: int | None = None,
        max_overhead: float = 0.05,
        loss_fn: GivenLoss | None = None,
        probe: Probe | str | Iterable[Any] = "fixed",
        solver: Solver | None = None,
        verify: Literal["first", "always", False] = "first",
        enabled: bool = True,
        name: str = "cfl",
    ) -> None:
        super().__init__(
            name=name,
            enabled=enabled,
            settings={
                "every_n_steps": every_n_steps,
                "max_overhead": max_overhead,
                "loss_fn": loss_fn,
                "probe": probe,
                "solver": solver,
                "verify": verify,
            },
        )
        self._patterns = layers
        self._gauge_settings: dict[str, Any] = {
            "layers": layers,
            "probes": probes,
            "exact": exact,
            "paper_bound": paper_bound,
            "batch_size_fn": Probe.of(probe).batch_size_fn,
            "seed": (solver or Solver()).seed,
        }
        self._gauge = CFLGauge(**self._gauge_settings)
        self._start_afresh()
        self._crossings: dict[str, int] = {}
        self._above: dict[str, bool] = {}

    # ------------------------------------------------------------------ what users read

    @property
    def estimates(self) -> list[CFLEstimate]:
        """Estimates of the last reading, the closest to its limit first."""
        return list(self._estimates)

    @property
    def crossings(self) -> dict[str, int]:
        """Times that each layer's number rose above 1."""
        return dict(self._crossings)

    def report(self) -> str:
        """Return the layers of the last reading, ranked, one a line."""
        return layers_table([asdict(e) for e in self._estimates], most=len(self._estimates)) or "No reading was taken."

    def state_dict(self) -> dict[str, Any]:
        """Return the crossings so far as plain Python values."""
        return super().state_dict() | {"crossings": dict(self._crossings), "above": dict(self._above)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self._crossings = dict(state_dict["crossings"])
        self._above = dict(state_dict["above"])

    # ------------------------------------------------------------------ on the monitor's readings

    def begin(self, fit: WatchedFit) -> None:
        """Start afresh for a new fit; say so where nothing can be measured."""
        super().begin(fit)
        self.turn_off_if_synchronized(fit.trainer)
        self._gauge = CFLGauge(**self._gauge_settings)
        self._start_afresh()
        self._order = list(layer_names(fit.pl_module))
        if not self._order:
            self.turn_off("The module has no Linear or convolution layer.")
        elif not any(self._gauge.wants(name) for name in self._order):
            self.turn_off(f"Expected `layers` to match one of {', '.join(self._order)}; got {self._patterns!r}.")

    def measure(self, context: ReadingContext) -> None:
        """Estimate all layers."""
        self._fresh = False
        if not context.trainer.is_global_zero:
            return
        if isinstance(context.loss_fn, PartedLoss):
            self.turn_off(NEEDS_ONE_LOSS)
            return
        verdict = context.verdict
        refine = self._count % _REFINE_EVERY == 0 or verdict != self._refined_at
        try:
            self._estimates = self._gauge.measure(
                context.pl_module,
                context.loss_fn,
                context.batches,
                context.optimizers,
                sandbox=context.sandbox(),
                mode=None if context.modes is None else context.modes[:, 0],
                refine=refine,
            )
        except NoLayerError as error:
            self.turn_off(str(error))
            return
        self._measurement = context.measurement
        self._measured_at = context.step
        self._count += 1
        self._fresh = True
        if refine:
            self._refined_at = verdict

    def settle(self, optimizers: Sequence[Any]) -> None:
        """Put the numbers at the learning rates that the step uses."""
        if not self._fresh or self._measurement is None:
            return
        s = common_factor(self._measurement.curvature, critical_curvature(optimizers))
        if s is None:
            self._estimates = [replace(e, cfl_number=None) for e in self._estimates]  # not those of this step
        elif s != 1.0:
            # lr_max is another one where more than the rate has moved: momentum, in OneCycleLR.
            rates = zip(learning_rates(optimizers), self._measurement.reading.lr, strict=True)
            t = next((now / before for now, before in rates if before), s)
            self._estimates = [
                e
                if e.cfl_number is None or e.lr_max is None
                else replace(e, cfl_number=s * e.cfl_number, lr_max=t / s * e.lr_max)
                for e in self._estimates
            ]

    def write(self, step: int, verdict: Verdict) -> None:
        """Write what was measured at ``step``."""
        if not self._fresh:
            return
        self._fresh = False
        metrics: dict[str, float] = {}
        for estimate in self._estimates:
            self._count_crossing(estimate)
            metrics |= self._metrics(estimate)
        layers = [asdict(e) | {"position": self._position(e.layer)} for e in self._estimates]
        row = {"run": self._run_id, "step": step, "verdict": verdict.name, "layers": layers}
        self._history.add(step, layers)
        self._outputs.row(row, metrics)
        if self._to_tell is not None and step > self._to_tell.step:
            self._tell()

    def changed(self, change: Change) -> None:
        """Tell the layers when the verdict goes beyond EDGE: at the next reading, whose numbers will be exact."""
        if change.verdict > Verdict.EDGE >= change.previous:
            self._to_tell = change
            if change.verdict is Verdict.DIVERGING:  # there may be no other
                self._tell()

    def finish(self, step: int) -> None:
        """Draw the heat map, and tell the crossings."""
        self._tell()
        if not self._history:
            return
        path = self._outputs.layers_figure(self._history) if has_something_to_draw(self._history) else None
        told = run_sentence(self._history, self._crossings)
        self._outputs.say(f"{len(self._history)} layer-wise readings; {told}." + (f" Heat map: {path}" if path else ""))

    # ------------------------------------------------------------------ inside

    def _start_afresh(self) -> None:
        self._estimates = []
        self._history = LayerHistory()
        self._order = []
        self._measurement = None
        self._fresh = False
        self._count = 0
        self._refined_at = None
        self._measured_at = 0
        self._to_tell = None

    def _tell(self) -> None:
        change = self._to_tell
        self._to_tell = None
        if change is None or not self._estimates or self._measurement is None:
            return
        ratio = self._measurement.reading.edge_ratio
        whole = "" if ratio is None else f"; the whole net at {ratio:.2f} of its"
        table = layers_table([asdict(e) for e in self._estimates])
        self._outputs.say(
            f"{change.verdict.name} since step {change.step}. Layers by their own limits, as of step "
            f"{self._measured_at}{whole}:\n{table}"
        )

    def _position(self, layer: str) -> int:
        return self._order.index(layer) if layer in self._order else len(self._order)

    def _count_crossing(self, estimate: CFLEstimate) -> None:
        number = estimate.cfl_number
        if number is None or math.isnan(number):
            return
        above = number > 1.0
        # A run that begins above its limit has not crossed it.
        crossed = above and not self._above.get(estimate.layer, above)
        self._crossings[estimate.layer] = self._crossings.get(estimate.layer, 0) + crossed
        self._above[estimate.layer] = above

    def _metrics(self, estimate: CFLEstimate) -> dict[str, float]:
        values = {"number": estimate.cfl_number, "lr_max": estimate.lr_max}
        if estimate.activated + estimate.transitioning + estimate.not_activated > 0.0:
            values |= {
                "activated": estimate.activated,
                "transitioning": estimate.transitioning,
                "not_activated": estimate.not_activated,
            }
        metrics = {
            f"{self.name}/{estimate.layer}/{key}": value
            for key, value in values.items()
            if value is not None and math.isfinite(value)
        }
        if estimate.layer in self._crossings:
            metrics[f"{self.name}/{estimate.layer}/crossings"] = float(self._crossings[estimate.layer])
        return metrics
