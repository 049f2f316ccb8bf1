"""Twin runs: what becomes of a perturbation in the last bit, or of a small one, within some steps.

The papers' test of numerical sensitivity as a probe. Both runs go on from the present state of module and optimizer, on
stand-ins for the parameters; nothing of the live run is touched.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.isolation.batches import map_batch
from eos_monitor.isolation.sandbox import LossFn, Sandbox, preserve_rng
from eos_monitor.isolation.twin import as_list, trained_parameters, twin_optimizer

AMPLIFYING = "amplifying"
NEUTRAL = "neutral"
ATTENUATING = "attenuating"
DEAD = "dead"
DIVERGED = "diverged"

# A perturbation that has reached this RelL1 has no room left to grow exponentially in.
_SATURATED = 0.1
_BLOCKS = 8
# Neither a rate whose interval includes 0 nor a tenfold change alone is called growth: on nets that train well the gain
# drifts to 3 - 14 within 400 steps without growing exponentially.
_FACTOR = 10.0
# Relative sizes far above rounding and far below anything the loss could feel.
_SIZES = {torch.float64: 1e-9, torch.float32: 1e-4}
_SAME_LOSS = 1e-5


@dataclass(frozen=True)
class TwinRun:
    """How the distance δ between a run and its perturbed twin went.

    Attributes:
        steps: Steps that both took.
        gain: ‖δ_t‖₂ / ‖δ_s‖₂ after each step t, with s the first step at which the twins differ; 0 before it.
        relative_l1: RelL1 = 2/N Σ|θ − θ'| / (|θ| + |θ'|) after each step, in [0, 2].
        losses: Loss of the unperturbed run before each step.
        rate: Growth of ln ‖δ‖ per step until it saturates; None where too few steps tell. Perturbations of each step's
            last bit add up, so that early steps show some growth in any run; the verdict asks for more.
        rate_low: Lower end of its 95 % interval.
        rate_high: Upper end of its 95 % interval.
        verdict: ``"amplifying"``, ``"neutral"``, ``"attenuating"``; ``"dead"`` where the unperturbed run has no
            gradient, or its loss does not depend on the inputs, so that nothing could grow; ``"diverged"`` where its
            loss is not finite.
    """

    steps: int
    gain: tuple[float, ...]
    relative_l1: tuple[float, ...]
    losses: tuple[float, ...]
    rate: float | None
    rate_low: float | None
    rate_high: float | None
    verdict: str

    def __str__(self) -> str:
        rate = "" if self.rate is None else f", {self.rate:+.3g} [{self.rate_low:+.3g}, {self.rate_high:+.3g}] a step"
        return (
            f"{self.verdict}: gain {self.gain[-1]:.3g} over {self.steps} steps{rate}; RelL1 {self.relative_l1[-1]:.2g}"
        )


def twin_run(
    module: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    steps: int = 64,
    perturbation: str | Tensor = "last-bit",
    k: float = 3.0,
    size: float | None = None,
    settings: Sequence[Sequence[Sequence[Mapping[str, Any]]]] | None = None,
    dtype: torch.dtype | None = None,
    sandbox: Sandbox | None = None,
    seed: int = 0,
) -> TwinRun:
    r"""Let a run and its perturbed twin go on from the present state, and follow their distance.

    .. math:: \mathrm{RelL1}(\theta, \theta')
        = \frac{2}{N} \sum_i \frac{|\theta_i - \theta'_i|}{|\theta_i| + |\theta'_i|}

    Buffers stand still: each evaluation starts from the module's present ones.

    Args:
        module: Module in its present mode.
        loss_fn: ``loss_fn(module, batch)`` -> scalar mean loss.
        batches: Batches of the steps, used in turn and over again.
        optimizer: Optimizer in use, or several; copies of them are stepped.
        steps: Steps to take, ≥ 1; each costs two forward and backward passes.
        perturbation: ``"last-bit"``: each gradient g is replaced by (k·g)/k in its own precision, which does nothing
            where k is a power of two; ``"random"``: the start is moved in a random direction; or a direction ``(n,)``,
            the critical mode, say.
        k: Factor of ``"last-bit"``.
        size: Length of a move, relative to ‖θ‖; by default 1e-9 in double and 1e-4 in single precision.
        settings: For each step, each optimizer and each of its groups, what a scheduler will have changed by then.
        dtype: Evaluate both runs in this precision instead of the module's own.
        sandbox: Sandbox to run in, when the module needs a special one.
        seed: Seed of the random direction.

    Raises:
        ValueError: If there is no batch or no trained parameter, or an argument is out of range.

    References:
        A PDE-based explanation of extreme numerical sensitivities and edge of stability (arXiv 2206.02001), §4.
    """
    optimizers = as_list(optimizer)
    params = trained_parameters(optimizers)
    with preserve_rng():
        data = list(batches)
    if steps < 1 or not data or not params:
        raise ValueError(f"Expected steps, batches and parameters, got {steps}, {len(data)} and {len(params)}.")
    if isinstance(perturbation, str) and perturbation not in ("last-bit", "random"):
        raise ValueError(f"Expected `perturbation` to be 'last-bit', 'random' or a vector, got {perturbation!r}.")
    if not (math.isfinite(k) and k > 0.0):
        raise ValueError(f"Expected a finite `k` > 0, got {k}.")
    run, twin = (_Trajectory(optimizers, params, dtype) for _ in range(2))
    if perturbation != "last-bit":
        twin.move(_direction(perturbation, run.numel, seed), _SIZES.get(run.dtype, 1e-4) if size is None else size)
    distances: list[float] = []
    relative: list[float] = []
    losses: list[float] = []
    with sandbox or Sandbox(module) as inside:

        def loss_of(trajectory: _Trajectory, batch: Any, stream: int) -> Tensor:
            return inside.evaluate(loss_fn, batch, trajectory.stand_ins, stream=stream, dtype=dtype)

        for t, batch in enumerate(islice(cycle(data), steps)):
            for trajectory in (run, twin):
                if settings is not None:
                    trajectory.set(settings[t])
                loss = loss_of(trajectory, batch, t)
                trajectory.step(loss, k if trajectory is twin and perturbation == "last-bit" else None)
                if trajectory is run:
                    losses.append(float(loss.detach()))
            theta = run.vector
            other = twin.vector
            distances.append(float(torch.linalg.vector_norm(theta - other)))
            relative.append(relative_l1(theta, other))
            if not math.isfinite(losses[-1]):
                break
        dead = run.still or _ignores_input(lambda batch: float(loss_of(run, batch, 0).detach()), data[0])
    return _judged(distances, relative, losses, dead, renewed=perturbation == "last-bit")


def relative_l1(theta: Tensor, other: Tensor) -> float:
    """Return RelL1, 2/N Σ|θ − θ'| / (|θ| + |θ'|) in [0, 2]; entries that are zero in both count as equal."""
    theta = theta.double()
    other = other.double()
    size = theta.abs() + other.abs()
    return float(2 * torch.where(size > 0, (theta - other).abs() / size, 0.0).mean())


class _Trajectory:
    """Stand-ins for the parameters with an optimizer each of their own."""

    def __init__(self, optimizers: Sequence[Optimizer], params: Sequence[Tensor], dtype: torch.dtype | None) -> None:
        self.stand_ins = {p: p.detach().clone().to(dtype or p.dtype).requires_grad_() for p in params}
        self.numel = sum(p.numel() for p in params)
        self.dtype = next(iter(self.stand_ins.values())).dtype
        self.still = False  # whether the last gradient was zero
        self._optimizers = [twin_optimizer(o, self.stand_ins) for o in optimizers]
        if dtype is not None:
            for twin in self._optimizers:
                for p, state in twin.state.items():
                    twin.state[p] = {key: _cast_state(value, dtype) for key, value in state.items()}

    @property
    def points(self) -> list[Tensor]:
        return list(self.stand_ins.values())

    def move(self, direction: Tensor, size: float) -> None:
        length = size * math.sqrt(sum(float(p.detach().double().square().sum()) for p in self.points))
        length = length or size
        scaled = direction.double() * (length / float(torch.linalg.vector_norm(direction.double())))
        with torch.no_grad():
            for p, part in zip(self.points, torch.split(scaled, [p.numel() for p in self.points]), strict=True):
                p.add_(part.view_as(p).to(p))

    def set(self, settings: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        for optimizer, groups in zip(self._optimizers, settings, strict=True):
            for group, changes in zip(optimizer.param_groups, groups, strict=True):
                group.update(changes)

    def step(self, loss: Tensor, k: float | None) -> None:
        gradients = torch.autograd.grad(loss, self.points, allow_unused=True)
        self.still = all(g is None or not bool(g.any()) for g in gradients)
        for p, g in zip(self.points, gradients, strict=True):
            p.grad = g if g is None or k is None else (k * g) / k
        for optimizer in self._optimizers:
            optimizer.step()

    @property
    def vector(self) -> Tensor:
        """θ in double precision, ``(n,)``."""
        return torch.cat([p.detach().double().reshape(-1) for p in self.points])


def _cast_state(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and value.ndim else value


def _direction(perturbation: str | Tensor, n: int, seed: int) -> Tensor:
    if isinstance(perturbation, str):
        return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    if perturbation.shape != (n,) or not bool(perturbation.any()):
        raise ValueError(f"Expected a direction of shape ({n},) other than zero, got {tuple(perturbation.shape)}.")
    return perturbation.detach()


def _ignores_input(loss_at: Callable[[Any], float], batch: Any) -> bool:
    """Whether the loss stays the same when all samples get the same input: the first tensor of the batch."""
    first: list[Tensor] = []

    def alike(x: Tensor) -> Tensor:
        if first or x.ndim == 0 or len(x) < 2:
            return x
        first.append(x)
        return x[:1].expand_as(x).clone()

    before = loss_at(batch)
    after = loss_at(map_batch(batch, alike))
    return bool(first) and math.isclose(before, after, rel_tol=_SAME_LOSS, abs_tol=0.0)


def _judged(
    distances: list[float], relative: list[float], losses: list[float], dead: bool, *, renewed: bool
) -> TwinRun:
    start = next((t for t, distance in enumerate(distances) if distance > 0.0), None)
    unit = 1.0 if start is None else distances[start]
    gain = tuple(distance / unit for distance in distances)
    rate, half = _rate(distances, relative, start)
    # A perturbation that comes anew at each step adds up, to t times the first at most, without any instability.
    grown = max(g / max(t - (start or 0) + 1, 1) if renewed else g for t, g in enumerate(gain))
    if not math.isfinite(losses[-1]):
        verdict = DIVERGED
    elif dead:
        verdict = DEAD
    elif start is not None and distances[-1] == 0.0:
        verdict = ATTENUATING
    elif rate is None:
        verdict = NEUTRAL
    elif rate - half > 0.0 and grown > _FACTOR:
        verdict = AMPLIFYING
    elif rate + half < 0.0 and gain[-1] < 1 / _FACTOR:
        verdict = ATTENUATING
    else:
        verdict = NEUTRAL
    return TwinRun(
        steps=len(distances),
        gain=gain,
        relative_l1=tuple(relative),
        losses=tuple(losses),
        rate=rate,
        rate_low=None if rate is None else rate - half,
        rate_high=None if rate is None else rate + half,
        verdict=verdict,
    )


def _rate(distances: list[float], relative: list[float], start: int | None) -> tuple[float | None, float]:
    """Return the mean growth of ln ‖δ‖ per step and half of its interval, from blocks of steps.

    Steps are correlated; means over blocks less so. Student's t over the blocks gives the interval.
    """
    if start is None:
        return None, 0.0
    grown = range(start, len(distances))
    end = next((t for t in grown if relative[t] >= _SATURATED or distances[t] == 0.0), len(distances))
    length = (end - 1 - start) // _BLOCKS
    if length < 1 or not all(math.isfinite(distance) for distance in distances[start:end]):
        return None, 0.0
    marks = [math.log(distances[start + i * length]) for i in range(_BLOCKS + 1)]
    rates = [(b - a) / length for a, b in zip(marks, marks[1:], strict=False)]
    spread = statistics.stdev(rates) / math.sqrt(_BLOCKS)
    return statistics.fmean(rates), float(stats.t.ppf(0.975, _BLOCKS - 1)) * spread
