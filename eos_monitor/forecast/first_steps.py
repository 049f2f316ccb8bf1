"""Copies of a module and its optimizers that take the first steps of a run."""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.forecast.lookahead import Settings
from eos_monitor.isolation.batches import clone_batch
from eos_monitor.isolation.sandbox import LossFn, seed_everything
from eos_monitor.isolation.twin import trained_parameters, twin_optimizer
from eos_monitor.isolation.wrappers import direct_forward
from eos_monitor.limits.thresholds import critical_curvature, has_learning_rate
from eos_monitor.readings.gauge import Gauge
from eos_monitor.readings.reading import StabilityReading
from eos_monitor.readings.settings import Solver

Outcome = Literal["falls", "rises", "diverges", "dead"]

# How far below the edge a warm-up is walked: readings every few steps, and an edge that moves between them.
BELOW = 0.8
_READINGS = 10
# Fewer of the coordinates than this share still have a gradient: what is left are output biases.
_DEAD = 0.1
_FITTED = 1e-3
_MOST_SETTLING = 5_000
_DRAWS = 16  # of the initial loss, where it is another one each time
# Of the largest of 20 draws over one of them, with the deviation known from 16: passed by chance in 1 of 1,000 runs.
_NOISE = 7.0


class FirstSteps:
    """A copy of a module and its optimizers that takes full-batch steps.

    Each step draws the same dropout masks, and whatever else comes from the global generators or from one that the
    module holds: losses under other masks differ without any step. What is random all the same is measured at the
    start, and a loss has to rise above it.
    """

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
        for m in self.module.modules():
            m.__dict__.update(direct_forward(m))
        self.optimizers = [twin_optimizer(optimizer, stand_ins) for optimizer in optimizers]
        for twin in self.optimizers:
            if any(group.get("train_mode") is False for group in twin.param_groups):
                twin.train()  # type: ignore[attr-defined]  # schedule-free: from the average to where it steps
        self.params = trained_parameters(self.optimizers)
        self.loss_fn = loss_fn
        self.batches = batches
        self.full_batch = full_batch
        self.batch_size_fn = batch_size_fn
        sizes = [batch_size_fn(batch) for batch in batches]
        self.samples = sum(sizes)
        self.weights = [size / self.samples for size in sizes]
        self.gauge = Gauge(Solver(rtol=rtol), batch_size_fn)
        self.readings: list[StabilityReading] = []
        self.losses: list[float] = []
        self.gradients = 0
        self.settling = 0
        self._alive: int | None = None  # coordinates with a gradient at the start
        self._dead = False
        self._rewound = [(held, _state_of(held)) for held in _generators(self.module)]
        self._noise = self._deviation()

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
                try:
                    self._read(step)
                except RuntimeError:  # derivatives overflow before the loss does
                    if step == 0:
                        raise
            if not going:
                return
            if step < steps:
                self._step()

    def walk_up(self, steps: int, schedule: Sequence[Settings | None]) -> int | None:
        """Take steps at 0.8 of the edge; return how many it took until the run's own settings are below the edge."""
        every = max(1, steps // _READINGS)
        scale = 0.0
        for step in range(steps + 1):
            self._set(schedule[step])
            if not self._differentiate() or self._dead:
                return None
            if step % every == 0 or step == steps:
                try:
                    reading = self._read(step)
                except RuntimeError:
                    return None
                if reading.edge_ratio is None:
                    return None
                if reading.edge_ratio < 1.0:
                    return step
                if reading.edge_scale is None:
                    return None
                scale = BELOW * reading.edge_scale
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
        return self.outcome() == "falls"

    @property
    def matvecs(self) -> int:
        """Hessian-vector products of all readings."""
        return sum(reading.matvecs for reading in self.readings)

    def outcome(self) -> Outcome:
        """Say what became of the loss."""
        if self._dead:
            return "dead"
        first = self.losses[0]
        if not all(math.isfinite(loss) for loss in self.losses):
            return "diverges"
        rounding = 4 * max(torch.finfo(p.dtype).eps for p in self.params) * abs(first)
        return "rises" if max(self.losses) > first + max(rounding, _NOISE * self._noise) else "falls"

    def _differentiate(self) -> bool:
        """Take the mean gradient over all batches; return whether the loss is finite."""
        for p in self.params:
            p.grad = None
        total = 0.0
        for weight, loss in zip(self.weights, self._each_loss(self.module), strict=True):
            loss = weight * loss
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.gradients += 1
        self.losses.append(total)
        alive = sum(int((p.grad.to_dense() != 0).sum()) for p in self.params if p.grad is not None)
        if self._alive is None:
            self._alive = alive
        # Without the loss gone, too: at a perfect fit there is no gradient either.
        self._dead = alive <= _DEAD * self._alive and total > _FITTED * abs(self.losses[0])
        return math.isfinite(total)

    def _each_loss(self, module: nn.Module) -> Iterator[Tensor]:
        """Return the loss of each batch, with the same random numbers each time: those of the readings."""
        for held, state in self._rewound:
            _set_state(held, state)
        for stream, batch in enumerate(self.batches):
            seed_everything(stream)
            yield self.loss_fn(module, clone_batch(batch))

    def _deviation(self) -> float:
        """Return the standard deviation of the loss at the start, over draws of what cannot be repeated."""
        spare = copy.deepcopy(self.module)  # running averages move
        draws: list[float] = []
        while len(draws) < _DRAWS:
            losses = [float(loss.detach()) for loss in self._each_loss(spare)]
            draws.append(sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True)))
            if draws == [draws[0], draws[0]] or not math.isfinite(draws[-1]):
                return 0.0
        return statistics.stdev(draws)

    def _step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def _read(self, step: int) -> StabilityReading:
        """Take a reading; where the state is too young, of copies whose state is carried on at the present gradient."""
        optimizers = self.optimizers
        settling = 0
        curvature = critical_curvature(optimizers)
        if not curvature.ready or (curvature.c is None and not curvature.without_threshold):
            kept = [p.detach().clone() for p in self.params]
            optimizers = [twin_optimizer(optimizer, {p: p for p in self.params}) for optimizer in optimizers]
            rates = [[group.get("lr") for group in optimizer.param_groups] for optimizer in optimizers]
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
        _set_rates(self.optimizers, [[new.get("lr") for new in news] for news in settings or ()])

    def _scale_rates(self, scale: float) -> None:
        rates = [
            [scale * float(group["lr"]) if has_learning_rate(group) else None for group in o.param_groups]
            for o in self.optimizers
        ]
        _set_rates(self.optimizers, rates)


def _set_rates(optimizers: Sequence[Optimizer], rates: Sequence[Sequence[Any]]) -> None:
    for optimizer, row in zip(optimizers, rates, strict=True):
        for group, lr in zip(optimizer.param_groups, row, strict=True):
            if not has_learning_rate(group) or lr is None:
                continue
            # Capturable optimizers want their tensor.
            group["lr"] = torch.full_like(group["lr"], float(lr)) if isinstance(group["lr"], Tensor) else float(lr)


def _generators(module: nn.Module) -> list[Any]:
    """Return the generators that modules hold beside the global ones."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    found = [value for m in module.modules() for value in vars(m).values() if isinstance(value, kinds)]
    return list({id(value): value for value in found}.values())


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
