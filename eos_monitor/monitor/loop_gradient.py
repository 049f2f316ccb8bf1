"""The gradient that a step of a plain loop takes, beside that of the loss that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.isolation.batches import move_batch
from eos_monitor.isolation.sandbox import LossFn
from eos_monitor.isolation.twin import needs_closure, trained_parameters
from eos_monitor.monitor.engine import Engine
from eos_monitor.monitor.loss_match import COMPARING, Agreement, agreement, measured_gradient
from eos_monitor.readings.settings import Probe

_EXACT = 1e-3  # of the step's gradient, that may be left over
_TELLS_APART = 10.0  # times more is left over of gradients that belong to another step
_LOSS_SCALE = 128.0  # factors from here on are a gradient scaler's


class LoopGradient:
    """Compares the two, once a run, at a step that a reading precedes.

    The step's gradient is what the parameters hold when the step is announced, if the loop calls ``backward`` before
    it, or else when the next one is, if the loop clears gradients no sooner: which of the two is found out by which
    one the measured loss leaves nothing over of. Where neither is, nothing is told. Of the direction nothing is told
    either: a loop may have clipped, accumulated or cleared what is found.

    Args:
        module: Module that is trained.
        loss_fn: The loss that is measured.
        optimizers: Its optimizers.
        engine: Takes the readings.
        probe: What they are taken on.
    """

    def __init__(
        self, module: nn.Module, loss_fn: LossFn, optimizers: Sequence[Optimizer], *, engine: Engine, probe: Probe
    ) -> None:
        self._module = module
        self._loss_fn = loss_fn
        self._optimizers = optimizers
        self._engine = engine
        self._probe = probe
        self._gradient: Tensor | None = None  # of the measured loss at the last step
        self._before: Agreement | None = None  # of it with what the parameters held then

    def step(self, batch: Any, *, read: bool) -> None:
        """Compare, at the announcement of a step.

        Args:
            batch: Its batch.
            read: Whether a reading precedes it.
        """
        if self._gradient is not None:
            self._engine.guard.run(COMPARING, self._compare)
            self._gradient = None
        if read and self._engine.match.open and self._is_comparable():
            self._engine.guard.run(COMPARING, lambda: self._begin(batch))

    def _is_comparable(self) -> bool:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size() > 1:
            return False
        if len(self._optimizers) != 1 or needs_closure(self._optimizers[0]) or self._engine.samples.halved:
            return False  # halved: a whole batch does not fit beside the reading
        hooked = any(
            p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
            for p in trained_parameters(self._optimizers)
        )
        # Batches that are given need not have the form of the loop's.
        return not hooked and (self._engine.samples.kind != "given" or bool(self._probe.full_batch))

    def _begin(self, batch: Any) -> None:
        samples = self._engine.samples
        params = trained_parameters(self._optimizers)
        device = params[0].device
        whole = bool(self._probe.full_batch) and samples.whole
        self._gradient = measured_gradient(
            self._module,
            self._loss_fn,
            samples.on(device, batch) if whole else [move_batch(batch, device)],
            params,
            batch_size_fn=self._probe.batch_size_fn,
        )
        self._before = self._held(self._gradient)

    def _held(self, gradient: Tensor) -> Agreement | None:
        params = trained_parameters(self._optimizers)
        if sum(p.numel() for p in params) != len(gradient):
            return None  # layers were thawed, or frozen
        return agreement(gradient, params, [p.grad for p in params])

    def _compare(self) -> None:
        assert self._gradient is not None
        found = _nearest([self._before, self._held(self._gradient)])
        self._engine.match.add(found, tolerance=_EXACT)


def _nearest(candidates: Sequence[Agreement | None]) -> Agreement | None:
    """Return the one that is the step's; None if none is, or that cannot be told."""
    near = sorted((c for c in candidates if c is not None and c.rest <= _EXACT), key=lambda c: c.rest)
    one = next((c for c in near if abs(c.factor - 1.0) <= _EXACT), None)
    if one is not None:
        return one
    # Beside a gradient of the step, that of the step before may be as straight late in a run, but not as a rule.
    if not near or (len(near) == 2 and near[1].rest <= _TELLS_APART * near[0].rest):
        return None
    return near[0] if abs(near[0].factor) < _LOSS_SCALE else None
