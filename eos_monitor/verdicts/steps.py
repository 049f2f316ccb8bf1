"""What optimizer steps bring the detector, in their order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from eos_monitor.curvature.hessian import SumOverRanks
from eos_monitor.readings.guard import Guard
from eos_monitor.verdicts.projector import UpdateProjector, movement

BUFFERED = 64  # steps that wait for one another where reading a number has a price
FOLLOWING = "following the steps"
_RISE = 1.4  # of the learning rate, that is not kept waiting
_TRIAL = 64  # steps after which the cost of following updates is known
_EARLY = (4, 16)  # and for large nets, where they take long, if it is out of all proportion
_FAR = 4.0  # times the share
# Coordinates up to which following updates costs next to nothing beside a step of the net that has them.
_SMALL = 1 << 24
_SHARE = 0.25  # of the budget, that following updates may take

_T = TypeVar("_T")
Consumer = Callable[..., Any]  # consumer(step, loss=…, lr=…, …), as InstabilityDetector.update


@dataclass
class _Step:
    step: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    loss: Tensor | None = None
    movement: Tensor | None = None  # of the update before this one


class StepBuffer:
    """Passes on what each step brings, at once on the CPU unless told otherwise, and many steps together elsewhere.

    On an accelerator every number that is read waits for it, and over several processes the loss of a step is a mean
    that takes a collective call: there 64 steps are passed on together. Sooner where the learning rate rises fast and,
    on the CPU, where a loss is not finite.

    Args:
        params: Parameters, in the order of all vectors.
        consumer: What to pass it on to.
        movements: Whether to follow the updates; None for if that costs less than a quarter of ``max_overhead``.
        max_overhead: Budget, as a share of the training time.
        training_seconds: Clock of the training time, which stands still while a reading is taken.
        buffered: Steps that are passed on together on the CPU: one after the other, with training in between, each
            costs two to three times as much.
        processes: Number of processes of a data-parallel run.
        sum_over_ranks: Sum over them.
        from_first: What the first of them has, on every one.
        tell: Called with a sentence if updates turn out too expensive to follow.
        guard: Keeps a failure from ending the run; one of its own by default.
        seed: Seed of the random projection.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        consumer: Consumer,
        *,
        movements: bool | None = None,
        max_overhead: float = 0.05,
        training_seconds: Callable[[], float] = time.perf_counter,
        buffered: int = 1,
        processes: int = 1,
        sum_over_ranks: SumOverRanks | None = None,
        from_first: Callable[[Any], Any] = lambda value: value,
        tell: Callable[[str], None] = lambda sentence: None,
        guard: Guard | None = None,
        seed: int = 0,
    ) -> None:
        self._consumer = consumer
        self._sum = sum_over_ranks
        self._from_first = from_first
        self._tell = tell
        self._guard = Guard() if guard is None else guard
        self._params = list(params)
        self._seed = seed
        # It may want more memory than there is; the losses are worth a verdict all the same.
        wanted = movements is not False and bool(params)
        self._projector = self._attempt(lambda: UpdateProjector(params, seed)) if wanted else None
        self._on_trial = movements is None
        self._max_overhead = max_overhead
        self._cheap = processes == 1 and all(p.device.type == "cpu" for p in params)
        self._buffered = buffered if self._cheap else BUFFERED
        self._waiting: list[_Step] = []
        self._open: _Step | None = None
        self._losses: list[Tensor] = []  # of the micro-batches so far
        self._whole = False  # whether there are no others in this step
        self._movement: Tensor | None = None
        self._last_lr: tuple[float, ...] = ()
        self._training_seconds = training_seconds
        self._began = training_seconds()
        self._spent = 0.0
        self._ended = 0
        self._last_ended = -1

    def project_on(self, w: Tensor | None, params: Sequence[Tensor]) -> None:
        """Project updates of ``params`` on ``w``, ``(n,)``, from now on."""
        if self._projector is None:
            return
        if len(params) != len(self._params) or any(a is not b for a, b in zip(params, self._params, strict=True)):
            self._params = list(params)  # some were frozen or thawed
            self._projector = UpdateProjector(params, self._seed)
        self._timed(lambda projector: projector.project_on(w))

    def begin(self, step: int, settings: Callable[[], Mapping[str, Any]]) -> None:
        """Say that the update of ``step`` comes next; once a step, further calls do nothing.

        Args:
            step: Optimizer step.
            settings: Returns ``lr`` and what else :meth:`InstabilityDetector.update` takes of the settings.
        """
        if self._open is not None:
            return
        self._open = _Step(step, self._attempt(settings) or {}, movement=self._movement)
        self._movement = None
        self._timed(lambda projector: projector.before())
        before = self._last_lr
        # A learning rate that stays can wait for the loss of the step.
        if self._rises(self._open.settings) or (self._buffered == 1 and self._last_lr != before):
            self.flush()
            self._pass_on(self._open)
            self._open = _Step(step)

    def add_loss(self, loss: Tensor | float, factor: float = 1.0, *, whole: bool = False) -> None:
        """Take in ``factor`` · ``loss`` of one micro-batch of the present step, whose loss is the mean over them.

        Args:
            loss: Scalar.
            factor: Factor on it.
            whole: Whether the step has no other micro-batch.
        """
        value = (
            loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64, device="cpu")
        )
        self._losses.append(value if factor == 1.0 else value * factor)
        self._whole = whole
        if whole and self._buffered == 1 and self._open is not None:
            self._pass_on(self._open, float(self._losses.pop()))
            self._open = _Step(self._open.step)

    def end(self, step: int) -> None:
        """Say that ``step`` is over; further calls do nothing."""
        # Over several processes every one has to count the same steps, also those in which it saw nothing.
        if step == self._last_ended or (self._sum is None and self._open is None and not self._losses):
            return
        self._last_ended = step
        ended = self._open or _Step(step)
        self._open = None
        if self._losses:
            ended.loss = self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).mean()
            self._losses = []
        self._movement = self._timed(lambda projector: projector.after())
        self._waiting.append(ended)
        self._ended += 1
        lost = self._cheap and ended.loss is not None and not math.isfinite(float(ended.loss))
        if lost or len(self._waiting) >= self._buffered:
            self.flush()
        if self._on_trial and self._ended == _TRIAL:
            self._on_trial = False
            self._judge_cost(1.0)
        elif self._on_trial and self._ended in _EARLY and _size(self._params) > _SMALL:
            self._judge_cost(_FAR)

    def flush(self) -> None:
        """Pass on what waits; on every process of a run, or on none."""
        if not self._waiting:
            return
        waiting = self._waiting
        self._waiting = []
        losses = _read([step.loss for step in waiting], 1)
        movements = _read([step.movement for step in waiting], 4)
        means = self._mean_losses([None if value is None else value[0] for value in losses])
        for step, loss, moved in zip(waiting, means, movements, strict=True):
            self._pass_on(step, loss, moved)

    def catch_up(self) -> None:
        """Pass on what waits, and the loss of the present step if it is whole; its update is still to come."""
        self.flush()
        if self._open is not None and self._whole and self._losses and self._sum is None:
            self._pass_on(self._open, float(self._losses.pop()))
            self._open = _Step(self._open.step)

    def _pass_on(self, step: _Step, loss: float | None = None, moved: list[float] | None = None) -> None:
        if moved is None and step.movement is not None:
            moved = _read([step.movement], 4)[0]
        inputs = dict(step.settings) | ({} if moved is None else movement(moved)._asdict())
        if loss is not None:
            inputs["loss"] = loss
        if not inputs and self._cheap:
            return  # all of it was passed on before
        self._attempt(lambda: self._consumer(step.step, **inputs))

    def _timed(self, action: Callable[[UpdateProjector], Tensor | None]) -> Tensor | None:
        projector = self._projector
        if projector is None:
            return None
        began = time.perf_counter()
        result = self._attempt(lambda: action(projector))
        self._spent += time.perf_counter() - began
        return result

    def _attempt(self, action: Callable[[], _T]) -> _T | None:
        return self._guard.run(FOLLOWING, action, together=True)

    def _mean_losses(self, losses: list[float | None]) -> list[float | None]:
        """Return the means over all processes that have a loss."""
        if self._sum is None:
            return losses
        known = torch.tensor([float(loss is not None) for loss in losses], device="cpu")
        values = torch.tensor([0.0 if loss is None else loss for loss in losses], dtype=torch.float64, device="cpu")
        sums = self._sum(torch.cat([values, known.double()])).tolist()
        n = len(losses)
        return [total / count if count else None for total, count in zip(sums[:n], sums[n:], strict=True)]

    def _rises(self, settings: Mapping[str, Any]) -> bool:
        last = self._last_lr
        self._last_lr = tuple(settings.get("lr", ()))
        ahead = settings.get("lr_ahead")
        foreseen = ahead is not None and bool(self._last_lr) and ahead >= _RISE * self._last_lr[0]
        return foreseen or any(b >= _RISE * a > 0.0 for a, b in zip(last, self._last_lr, strict=False))

    def _judge_cost(self, tolerance: float) -> None:
        """Give up following the updates if that takes more than ``tolerance`` times its share."""
        share = self._spent / max(self._training_seconds() - self._began, 1e-9)
        if self._from_first(share > tolerance * _SHARE * self._max_overhead) and self._projector is not None:
            self._projector = None
            self._movement = None
            self._on_trial = False
            self._tell(
                f"updates are not followed, because that would take {share:.1%} of the training time; projections=True "
                "follows them all the same"
            )


def follows(projections: bool | None, params: Sequence[Tensor], *, exact: bool) -> bool | None:
    """Return whether to follow updates where the user has said ``projections``; None for if it fits into the budget.

    Args:
        projections: What the user has said; None for nothing.
        params: The parameters.
        exact: Whether nothing should depend on a clock: nets that are not large are followed then in any case.
    """
    return True if projections is None and exact and _size(params) <= _SMALL else projections


def _size(params: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in params)


def _read(tensors: list[Tensor | None], size: int) -> list[list[float] | None]:
    """Read tensors of one size from their device, in one go."""
    if len(tensors) == 1:
        (tensor,) = tensors
        return [None if tensor is None else tensor.reshape(size).tolist()]
    known = [tensor.reshape(size).double() for tensor in tensors if tensor is not None]
    if not known:
        return [None] * len(tensors)
    values = iter(torch.stack(known).tolist())
    return [None if tensor is None else next(values) for tensor in tensors]


def kind_of(optimizers: Sequence[Any]) -> dict[str, Any]:
    """Return ``family`` and ``momentum`` of optimizers, as :class:`InstabilityDetector` takes them.

    The first group speaks for all. A second moment is told by the settings that go with it.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not groups:
        return {"family": "sgd", "momentum": 0.0}
    group = groups[0]
    betas = group.get("betas")
    momentum = betas[0] if isinstance(betas, (tuple, list)) and betas else group.get("momentum") or 0.0
    adaptive = betas is not None or any(key in group for key in ("centered", "rho", "lr_decay", "beta2_decay"))
    family = "adam" if adaptive else "nesterov" if group.get("nesterov") else "sgd"
    momentum = float(momentum)
    return {"family": family, "momentum": momentum if 0.0 <= momentum < 1.0 and math.isfinite(momentum) else 0.0}
