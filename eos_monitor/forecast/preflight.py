"""Before training: where the edge is, and what the first steps do, on copies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from eos_monitor.forecast.first_steps import BELOW, FirstSteps, Outcome
from eos_monitor.forecast.lookahead import Position, Settings, SettingsAhead
from eos_monitor.isolation.batches import batch_size
from eos_monitor.isolation.sandbox import LossFn, preserve_rng
from eos_monitor.isolation.twin import as_list
from eos_monitor.readings.reading import StabilityReading


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What the first steps of a run will meet, measured on copies. What cannot be said is None.

    Attributes:
        lr: Learning rate of each group at the first step.
        readings: Readings along the first steps at the run's own settings, the first before step 0.
        settling: Steps that the optimizer's state was carried on at the initial gradient, to be old enough for the
            first reading; 0 where the state needs no age.
        losses: Mean loss over the batches before each step, and after the last.
        outcome: What the steps do: ``"falls"``; ``"rises"`` (some loss is above the first one); ``"diverges"`` (a
            loss is not finite); ``"dead"`` (hardly a parameter has a gradient any more).
        warmup: Steps after which ``lr`` was below the edge, on a copy whose rates were held at 0.8 of it, if a linear
            warm-up of that length did not raise the loss of another one.
        warmup_readings: The readings of the copy held at 0.8 of its edge, at ``lr``.
        scheduled: Whether the steps followed a schedule.
        full_batch: Whether the batches are all the data that a step uses.
        samples: Samples in the batches.
        gradients: Gradients of the mean loss over all batches that this took.
        matvecs: Hessian-vector products over all batches that this took.
        seconds: Wall-clock time.
    """

    lr: tuple[float, ...]
    readings: tuple[StabilityReading, ...]
    settling: int
    losses: tuple[float, ...]
    outcome: Outcome
    warmup: int | None = None
    warmup_readings: tuple[StabilityReading, ...] = ()
    scheduled: bool = False
    full_batch: bool = False
    samples: int = 0
    gradients: int = 0
    matvecs: int = 0
    seconds: float = 0.0

    @property
    def edge_ratio(self) -> float | None:
        """Edge ratio at initialization."""
        return self.readings[0].edge_ratio

    @property
    def edge_lr(self) -> tuple[float, ...] | None:
        """Learning rates at which it would be 1."""
        return self.readings[0].edge_lr

    @property
    def held_ratio(self) -> float | None:
        """Highest edge ratio that two readings in a row reached (the only one, if the run ended before a second).

        An instability takes some steps to build up. Adam's first gradients can put it above the edge for a step or two,
        which its next gradients end.
        """
        ratios = [reading.edge_ratio for reading in self.readings if reading.edge_ratio is not None]
        return max(map(min, pairwise(ratios)), default=ratios[0] if ratios else None)

    @property
    def above(self) -> bool | None:
        """Whether the first steps are taken above the full-batch edge: a held ratio above 1."""
        return None if self.held_ratio is None else self.held_ratio > 1.0

    def __str__(self) -> str:
        return "\n".join([*self._verdict(), *self._evidence(), *self._limits()])

    def _verdict(self) -> list[str]:
        first = self.readings[0]
        lr = _rates(self.lr)
        if first.edge_ratio is None:
            return [f"lr {lr}: the edge is not known here ({'; '.join(first.notes) or 'no reading'})."]
        where = f"lr {lr} is {first.edge_ratio:.2g}× the full-batch edge at step 0"
        if not self.above:
            beside = ", yet they raise the loss: not by this edge, but too high" if self.outcome != "falls" else ""
            return [f"{where}, and the first steps are not held above it{beside}."]
        if self.scheduled or first.edge_ratio <= 1.0 or first.edge_lr is None:
            return [f"{where}, and the first steps are held at {self.held_ratio:.2g}× of it: too high."]
        edge = _rates(first.edge_lr)
        lower = f"lr ≤ {edge}" if self.full_batch else f"an lr below {edge} (minibatches become unstable earlier)"
        if self.warmup is not None:
            return [f"{where}; warm-up of about {self.warmup} steps, or {lower}."]
        trail = ", ".join(f"{r.edge_ratio:.2g}" for r in self.warmup_readings if r.edge_ratio is not None)
        return [
            f"{where}; {lower}. No length of a warm-up can be said: on a copy walked at {BELOW} of its edge, lr {lr} "
            f"was {trail} times the edge, or its loss rose."
        ]

    def _evidence(self) -> list[str]:
        known = [reading for reading in self.readings if reading.edge_ratio is not None]
        lines = []
        if known:
            trail = ", ".join(f"{reading.edge_ratio:.2g} at step {reading.step}" for reading in known)
            lines.append(f"Edge ratio along the {'schedule' if self.scheduled else 'first steps'}: {trail}.")
        highest = max((loss for loss in self.losses if math.isfinite(loss)), default=math.nan)
        taken = len(self.losses) - 1
        words = {
            "falls": "never rises above its start",
            "rises": f"rises to {highest:.3g}",
            "diverges": "stops being finite",
            "dead": "stands still: hardly a parameter has a gradient any more (dead, not stable)",
        }
        lines.append(
            f"Loss over {taken} full-batch steps of a copy: {self.losses[0]:.3g} → {self.losses[-1]:.3g}; it "
            f"{words[self.outcome]}."
        )
        lines.append(
            f"Measured on {self.samples} samples with {self.gradients} gradients and {self.matvecs} Hessian-vector "
            f"products over them, in {self.seconds:.2g} s."
        )
        return lines

    def _limits(self) -> list[str]:
        limits = ["what the sharpness does later is not known"]
        if not self.full_batch:
            limits.append("with minibatches instability comes earlier than this edge")
        if self.settling:
            limits.append(
                f"the optimizer's state is too young at first: it was carried on for {self.settling} steps at the "
                "gradient of the point"
            )
        return [f"Limits: {'; '.join(limits)}."]


def preflight(
    module: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    steps: int = 20,
    schedulers: Sequence[Any] | None = None,
    full_batch: bool = False,
    rtol: float = 1e-2,
    batch_size_fn: Callable[[Any], int] = batch_size,
) -> Preflight:
    """Say before training how far a learning rate is from the edge, and what the first steps do.

    Copies of module and optimizer take ``steps`` steps, each on the mean gradient over all ``batches``, with readings
    of the edge ratio between them. Module, optimizers, schedulers and generators stay as they are. Dropout masks and
    the like are the same at each of these steps, so that a loss rises by what a step does and by nothing else; where a
    loss is random all the same, it has to rise above what it varies by at the start.

    An adaptive optimizer has no edge yet at its first steps: its state would mean nothing. There the state is carried
    on, on another copy that does not move, by further steps at the gradient of that point until it is old enough: the
    edge with the preconditioner settled on that gradient. The steps themselves are those of the real optimizer.

    Where the first steps are above the edge and there is no schedule, a second copy is walked at 0.8 of its measured
    edge. If ``lr`` is below the edge after N of these steps, a third copy takes a linear warm-up of N steps: where its
    loss never rises above the start, N is named, otherwise no number.

    The first steps of an adaptive optimizer far above (8 times and more) can raise the loss although its next gradients
    put it below the edge again: there the loss of the copy says more than the edge.

    Below the edge a momentum can raise the loss for some steps too: the first step of the heavy ball is one of plain
    gradient descent, whose own edge is lower (at r = 1/(1 + γ)).

    Args:
        module: Module that will be trained, in the mode that it will be trained in.
        loss_fn: ``loss_fn(module, batch)`` -> scalar mean loss.
        batches: Batches of any structure.
        optimizer: The optimizer that will be used, or several.
        steps: Steps of the copies.
        schedulers: As for :class:`SettingsAhead`: those stepped with the optimizer. Their epochs never end here.
        full_batch: Whether ``batches`` are all the data that a step will use.
        rtol: Relative residual of a reading.
        batch_size_fn: Samples in a batch; by default the first dimension of its first tensor.

    Raises:
        TypeError: If the module cannot be deep-copied.
        ValueError: If there is no batch, or an optimizer trains parameters outside the module.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.4)
        >>> result = preflight(net, lambda m, b: m(b).square().mean(), [x], sgd, full_batch=True)
        >>> round(result.edge_ratio, 4), round(result.edge_lr[0], 4), result.outcome  # 2 / λ_max(2/N XᵀX) = 2/9
        (1.8, 0.2222, 'rises')
    """
    if steps < 1:
        raise ValueError(f"Expected `steps` >= 1, got {steps}.")
    optimizers = as_list(optimizer)
    data = list(batches)
    if not data:
        raise ValueError("Expected at least one batch, got none.")
    began = time.perf_counter()
    schedule = _foreseen(schedulers or (), optimizers, steps)

    def start() -> FirstSteps:
        return FirstSteps(module, loss_fn, data, optimizers, rtol, batch_size_fn, full_batch)

    with preserve_rng(), torch.inference_mode(False), torch.enable_grad():
        run = start()
        run.take(steps, schedule)
        result = Preflight(
            lr=run.readings[0].lr,
            readings=tuple(run.readings),
            settling=run.settling,
            losses=tuple(run.losses),
            outcome=run.outcome(),
            scheduled=schedulers is not None,
            full_batch=full_batch,
            samples=run.samples,
            gradients=run.gradients,
            matvecs=run.matvecs,
        )
        if result.above and not result.scheduled and (result.edge_ratio or 0.0) > 1.0:
            result = _with_warmup(result, start, steps, schedule)
    return replace(result, seconds=time.perf_counter() - began)


def _foreseen(schedulers: Sequence[Any], optimizers: Sequence[Optimizer], steps: int) -> list[Settings]:
    """Return the settings of each step and of the one after the last."""
    ahead = SettingsAhead(schedulers, optimizers)
    schedule = []
    for step in range(steps + 1):
        settings = ahead.after(step, Position(0))
        if settings is None:
            raise ValueError(f"Expected schedulers that can be foreseen for {steps} steps. {ahead.why_not}")
        schedule.append(settings)
    return schedule


def _with_warmup(
    result: Preflight, start: Callable[[], FirstSteps], steps: int, schedule: Sequence[Settings]
) -> Preflight:
    """Return the result with the length of a warm-up, if one is found."""
    walk = start()
    climb = start()
    warmup = walk.walk_up(steps, schedule)
    if warmup is not None and not climb.ramp_up(warmup, steps, schedule):
        warmup = None
    return replace(
        result,
        warmup=warmup,
        warmup_readings=tuple(walk.readings),
        gradients=result.gradients + walk.gradients + climb.gradients,
        matvecs=result.matvecs + walk.matvecs,
    )


def _rates(lr: tuple[float, ...]) -> str:
    return ", ".join(dict.fromkeys(f"{value:.2g}" for value in lr)) or "of the optimizer's own"
