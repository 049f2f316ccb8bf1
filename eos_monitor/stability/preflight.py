"""Before training: where the edge is, and what the first steps do, on copies."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.curvature.batches import batch_size, clone_batch
from eos_monitor.curvature.sandbox import LossFn, preserve_rng
from eos_monitor.curvature.twin import trained_parameters, twin_optimizer
from eos_monitor.stability.gauge import Gauge
from eos_monitor.stability.lookahead import Position, Settings, SettingsAhead
from eos_monitor.stability.reading import StabilityReading
from eos_monitor.stability.thresholds import critical_curvature

Outcome = Literal["falls", "rises", "diverges", "dead"]

_READINGS = 10
# How far below the edge a warm-up is walked: readings every few steps, and an edge that moves between them.
_BELOW = 0.8
# Fewer of the coordinates than this share still have a gradient: what is left are output biases.
_DEAD = 0.1
_MOST_SETTLING = 5_000


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
        first, lr = self.readings[0], _rates(self.lr)
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
            f"{where}; {lower}. No length of a warm-up can be said: on a copy walked at {_BELOW} of its edge, lr {lr} "
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
    of the edge ratio between them. Module, optimizers, schedulers and generators stay as they are.

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
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    data = list(batches)
    if not data:
        raise ValueError("Expected at least one batch, got none.")
    began = time.perf_counter()
    ahead = SettingsAhead(schedulers or (), optimizers)

    def settings(step: int) -> Settings | None:
        found = ahead.after(step, Position(0))
        if found is None:
            raise ValueError(f"Expected schedulers that can be foreseen for {steps} steps. {ahead.why_not}")
        return found

    schedule = [settings(step) for step in range(steps + 1)]

    def start() -> _Copy:
        return _Copy(module, loss_fn, data, optimizers, rtol, batch_size_fn, full_batch)

    with preserve_rng(), torch.inference_mode(False), torch.enable_grad():
        run = start()
        run.take(steps, schedule)
        result = run.result(scheduled=schedulers is not None)
        if result.above and not result.scheduled and (result.edge_ratio or 0.0) > 1.0:
            walk, climb = start(), start()
            warmup = walk.walk_up(steps, schedule)
            if warmup is not None and not climb.ramp_up(warmup, steps, schedule):
                warmup = None
            result = replace(
                result,
                warmup=warmup,
                warmup_readings=tuple(walk.readings),
                gradients=run.gradients + walk.gradients + climb.gradients,
                matvecs=run.matvecs + walk.matvecs,
            )
    return replace(result, seconds=time.perf_counter() - began)


class _Copy:
    """A copy of a module and its optimizers that takes full-batch steps."""

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFn,
        batches: Sequence[Any],
        optimizers: Sequence[Optimizer],
        rtol: float,
        batch_size_fn: Callable[[Any], int],
        full_batch: bool,
    ) -> None:
        try:
            self.module = copy.deepcopy(module)
        except Exception as error:
            raise TypeError(
                f"Expected a module that copy.deepcopy can copy, got {type(module).__name__}: {error} "
                "Call preflight on the module as it is before its first step."
            ) from error
        stand_ins: dict[Tensor, Tensor] = dict(zip(module.parameters(), self.module.parameters(), strict=True))
        outside = sum(p not in stand_ins for p in trained_parameters(optimizers))
        if outside:
            raise ValueError(f"Expected optimizers of the module's parameters, got {outside} from outside.")
        self.optimizers = [twin_optimizer(optimizer, stand_ins) for optimizer in optimizers]
        self.params = trained_parameters(self.optimizers)
        self.loss_fn, self.batches, self.full_batch = loss_fn, batches, full_batch
        self.batch_size_fn = batch_size_fn
        sizes = [batch_size_fn(batch) for batch in batches]
        self.samples = sum(sizes)
        self.weights = [size / self.samples for size in sizes]
        self.gauge = Gauge(rtol=rtol, batch_size_fn=batch_size_fn)
        self.readings: list[StabilityReading] = []
        self.losses: list[float] = []
        self.gradients = self.settling = 0
        self._alive: int | None = None  # coordinates with a gradient at the start
        self._dead = False

    def take(self, steps: int, schedule: Sequence[Settings | None]) -> None:
        """Take the steps at the run's own settings, with readings between them."""
        every = max(1, steps // _READINGS)
        for step in range(steps + 1):
            self._set(schedule[step])
            going = self._differentiate() and not self._dead
            if step == 0 and not math.isfinite(self.losses[0]):
                raise ValueError(f"Expected a finite loss at initialization, got {self.losses[0]}.")
            if step > 0 and not going:
                return
            if step % every == 0 or step == steps:
                self._read(step)
            if not going:
                return
            if step < steps:
                self._step()

    def walk_up(self, steps: int, schedule: Sequence[Settings | None]) -> int | None:
        """Take steps at 0.8 of the edge; return how many it took until the run's own settings are below the edge."""
        every, scale = max(1, steps // _READINGS), 0.0
        for step in range(steps + 1):
            self._set(schedule[step])
            if not self._differentiate() or self._dead:
                return None
            if step % every == 0 or step == steps:
                reading = self._read(step)
                if reading.edge_ratio is None:
                    return None
                if reading.edge_ratio < 1.0:
                    return step
                if reading.edge_scale is None:
                    return None
                scale = _BELOW * reading.edge_scale
            if step < steps:
                self._scale_rates(scale)
                self._step()
        return None

    def ramp_up(self, warmup: int, steps: int, schedule: Sequence[Settings | None]) -> bool:
        """Take a linear warm-up and ``steps`` steps after it; return whether the loss never rose above its start."""
        for step in range(warmup + steps + 1):
            self._set(schedule[0])
            if not self._differentiate() or self._dead:
                return False
            self._scale_rates(min(1.0, (step + 1) / warmup))
            self._step()
        return self._outcome() == "falls"

    @property
    def matvecs(self) -> int:
        return sum(reading.matvecs for reading in self.readings)

    def result(self, *, scheduled: bool) -> Preflight:
        return Preflight(
            lr=self.readings[0].lr,
            readings=tuple(self.readings),
            settling=self.settling,
            losses=tuple(self.losses),
            outcome=self._outcome(),
            scheduled=scheduled,
            full_batch=self.full_batch,
            samples=self.samples,
            gradients=self.gradients,
            matvecs=self.matvecs,
        )

    def _outcome(self) -> Outcome:
        if self._dead:
            return "dead"
        first = self.losses[0]
        if not all(math.isfinite(loss) for loss in self.losses):
            return "diverges"
        rounding = 4 * max(torch.finfo(p.dtype).eps for p in self.params) * abs(first)
        return "rises" if max(self.losses) > first + rounding else "falls"

    def _differentiate(self) -> bool:
        """Take the mean gradient over all batches; return whether the loss is finite."""
        for p in self.params:
            p.grad = None
        total = 0.0
        for weight, batch in zip(self.weights, self.batches, strict=True):
            loss = weight * self.loss_fn(self.module, clone_batch(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.gradients += 1
        self.losses.append(total)
        alive = sum(int((p.grad.to_dense() != 0).sum()) for p in self.params if p.grad is not None)
        if self._alive is None:
            self._alive = alive
        self._dead = alive <= _DEAD * self._alive
        return math.isfinite(total)

    def _step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def _read(self, step: int) -> StabilityReading:
        """Take a reading; where the state is too young, of copies whose state is carried on at the present gradient."""
        optimizers, settling = self.optimizers, 0
        curvature = critical_curvature(optimizers)
        if not curvature.ready or (curvature.c is None and not curvature.without_threshold):
            kept = [p.detach().clone() for p in self.params]
            optimizers = [twin_optimizer(optimizer, {p: p for p in self.params}) for optimizer in optimizers]
            rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
            _set_rates(optimizers, [[0.0 for _ in row] for row in rates])
            while not critical_curvature(optimizers).ready and settling < _MOST_SETTLING:
                for optimizer in optimizers:
                    optimizer.step()
                settling += 1
            _set_rates(optimizers, rates)
            with torch.no_grad():  # at a learning rate of 0 few optimizers move them, but some do
                for p, value in zip(self.params, kept, strict=True):
                    p.copy_(value)
        reading = self.gauge.measure(
            self.module, self.loss_fn, self.batches, optimizers, step=step, full_batch=self.full_batch
        ).reading
        if not self.readings:
            self.settling = settling
        self.readings.append(reading)
        return reading

    def _set(self, settings: Settings | None) -> None:
        for optimizer, news in zip(self.optimizers, settings or (), strict=True):
            for group, new in zip(optimizer.param_groups, news, strict=True):
                group.update({key: value for key, value in new.items() if key not in ("lr", "steps_ahead")})
        _set_rates(self.optimizers, [[new["lr"] for new in news] for news in settings or ()])

    def _scale_rates(self, scale: float) -> None:
        rates = [[scale * float(group["lr"]) for group in o.param_groups] for o in self.optimizers]
        _set_rates(self.optimizers, rates)


def _set_rates(optimizers: Sequence[Optimizer], rates: Sequence[Sequence[Any]]) -> None:
    for optimizer, row in zip(optimizers, rates, strict=True):
        for group, lr in zip(optimizer.param_groups, row, strict=True):
            # Capturable optimizers want their tensor.
            group["lr"] = torch.full_like(group["lr"], float(lr)) if isinstance(group["lr"], Tensor) else float(lr)


def _rates(lr: tuple[float, ...]) -> str:
    return ", ".join(dict.fromkeys(f"{value:.2g}" for value in lr))
