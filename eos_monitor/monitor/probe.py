"""The gauge for a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.forecast.lookahead import Position, SettingsAhead, edge_ratio_at
from eos_monitor.forecast.tracked_reading import TrackedReading
from eos_monitor.isolation.sandbox import LossFn
from eos_monitor.isolation.twin import as_list, trained_parameters
from eos_monitor.limits.thresholds import learning_rates
from eos_monitor.monitor.engine import Engine, append_jsonl
from eos_monitor.readings.gauge import Gauge
from eos_monitor.readings.reading import Measurement, StabilityReading
from eos_monitor.readings.settings import Solver
from eos_monitor.verdicts.detector import Verdict
from eos_monitor.verdicts.steps import StepBuffer


class StabilityProbe:
    """Measures the edge ratio of a plain PyTorch training loop while it runs.

    Call :meth:`step` once per optimizer step, before the update. It changes nothing in the run, and a failing reading
    never raises.

    Args:
        module: Module that is trained.
        optimizer: Optimizer in use, or several.
        loss_fn: ``loss_fn(module, batch)`` -> scalar mean loss.
        every_n_steps: Steps between readings; None for as often as ``max_overhead`` allows.
        max_overhead: Share of the training time that readings may take, in (0, 1].
        probe: ``"fixed"`` (copies of the first batches), ``"batch"`` (that of the step), or an iterable of batches.
        probe_samples: Samples to collect for ``"fixed"``.
        k: Number of eigenvalues, or ``"edge"`` for all of at least 0.75.
        rtol: Relative residual of a reading.
        raw_sharpness: Solve for λ_max(H) too where it does not follow from the edge ratio.
        full_batch: Whether the probe is all the data that each step uses. STABLE is only said of such runs.
        batch_size_fn: Samples in a batch; by default the first dimension of its first tensor.
        schedulers: Schedulers that are stepped after each optimizer step, to look ahead.
        projections: Follow each update, at one copy of the parameters and six passes over them a step; None for if it
            fits into the budget.

    Attributes:
        readings: All readings, oldest first.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> probe = StabilityProbe(net, sgd, lambda m, b: m(b).square().mean(), every_n_steps=1, full_batch=True)
        >>> for _ in range(3):
        ...     reading = probe.step(x)
        ...     sgd.zero_grad()
        ...     net(x).square().mean().backward()
        ...     sgd.step()
        >>> round(reading.edge_ratio, 4), probe.verdict.name
        (0.45, 'STABLE')
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        loss_fn: LossFn,
        *,
        every_n_steps: int | None = None,
        max_overhead: float = 0.05,
        probe: str | Iterable[Any] = "fixed",
        probe_samples: int = 256,
        k: int | Literal["edge"] = 1,
        rtol: float = 1e-2,
        raw_sharpness: bool = False,
        full_batch: bool = False,
        batch_size_fn: Callable[[Any], int] | None = None,
        schedulers: Sequence[Any] = (),
        projections: bool | None = None,
    ) -> None:
        self._module, self._loss_fn, self._full_batch = module, loss_fn, full_batch
        self._optimizers = as_list(optimizer)
        self._engine = Engine(
            Gauge(Solver(k=k, rtol=rtol, raw_sharpness=raw_sharpness), batch_size_fn),
            every_n_steps=every_n_steps,
            max_overhead=max_overhead,
            probe=probe,
            probe_samples=probe_samples,
            batch_size_fn=batch_size_fn,
        )
        self._step = 0
        self._engine.follow(self._optimizers)
        self._followed = TrackedReading(None)
        self._ahead = SettingsAhead(list(schedulers), self._optimizers) if schedulers else None
        self._steps = StepBuffer(
            trained_parameters(self._optimizers),
            self._engine.take_step,
            movements=True if projections is None and every_n_steps is not None else projections,
            max_overhead=max_overhead,
            training_seconds=lambda: self._engine.schedule.training_seconds,
        )
        self._engine.schedule.begin(0)

    def _highest_rate(self, step: int) -> float | None:
        if self._ahead is None:
            return None
        return max(self._ahead.rates(5, Position(step)), default=None)

    def _next_edge_ratio(self, measurement: Measurement, step: int) -> float | None:
        settings = None if self._ahead is None else self._ahead.after(1, Position(step))
        return edge_ratio_at(measurement, self._optimizers, settings)

    @property
    def readings(self) -> list[StabilityReading]:
        """All readings, oldest first."""
        return self._engine.readings

    @property
    def eigenvectors(self) -> Tensor | None:
        """Critical modes of the last reading, ``(n, k)``, in parameter space."""
        return self._engine.eigenvectors

    @property
    def verdict(self) -> Verdict:
        """Verdict as of the last step."""
        return self._engine.verdict

    @property
    def overhead(self) -> float | None:
        """Time spent on readings as a share of the training time."""
        return self._engine.schedule.overhead

    def step(self, batch: Any, loss: Tensor | float | None = None) -> StabilityReading | None:
        """Say that an optimizer step on ``batch`` is about to be taken; return a reading if one was due.

        Args:
            batch: Batch of the step.
            loss: Its loss, detached, if at hand; it feeds the verdict.
        """
        engine, step = self._engine, self._step
        self._step += 1
        reading = None
        with engine.schedule.own_time():
            self._steps.end(step - 1)
            self._steps.begin(
                step,
                lambda: {
                    "lr": learning_rates(self._optimizers),
                    "lr_ahead": self._highest_rate(step),
                    "edge_ratio": self._followed.edge_ratio(self._optimizers),
                },
            )
            engine.collect(batch)
            if self._full_batch:
                engine.samples.close()  # the first batch is all there is
            if loss is not None:
                self._steps.loss(loss, whole=True)
            if engine.due(step):
                measurement = engine.measure(
                    self._module,
                    self._loss_fn,
                    self._optimizers,
                    step=step,
                    batch=batch,
                    full_batch=self._full_batch and engine.samples.whole,
                )
                if measurement is not None:
                    reading = replace(measurement.reading, edge_ratio_next=self._next_edge_ratio(measurement, step))
                    self._followed = TrackedReading(measurement, self._followed)
                    self._steps.aim(self._followed.direction, trained_parameters(self._optimizers))
        if reading is not None:
            engine.take(reading)
        return reading

    def to_jsonl(self, path: str | Path) -> None:
        """Append all readings to a JSON-lines file, one a row."""
        for row in self._engine.rows:
            append_jsonl(Path(path), row)

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the detector's state as plain Python values."""
        return {"step": self._step, "detector": self._engine.detector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned. The next reading starts cold."""
        self._step = state["step"]
        self._engine.schedule.begin(self._step)
        self._engine.detector.load_state_dict(state["detector"])
