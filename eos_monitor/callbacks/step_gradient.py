"""The gradient that a step of a Trainer takes, beside that of the loss that is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eos_monitor.callbacks.losses import MeasuredLoss
from eos_monitor.callbacks.trainer_sandbox import TrainerSandbox
from eos_monitor.isolation.generators import Generators
from eos_monitor.isolation.twin import as_list, trained_parameters
from eos_monitor.isolation.wrappers import bare_optimizer
from eos_monitor.monitor.engine import Engine
from eos_monitor.monitor.loss_match import COMPARING, agreement, is_repeated, measured_gradient
from eos_monitor.optim.relaxation import Relaxation
from eos_monitor.readings.settings import Probe

_MOST_BATCHES = 32  # of one step
# Hooks of a module in which gradients can be changed before the callbacks' turn, or kept from the step before.
_HOOKS = ("backward", "on_after_backward", "optimizer_step", "optimizer_zero_grad", "manual_backward")
_CALLBACK_HOOKS = ("on_after_backward", "on_before_optimizer_step")


class StepGradient:
    """Compares the two, once a run, at a step that a reading precedes.

    The measured loss is differentiated before each micro-batch of the step, on the very batch, weights and buffers; the
    step's gradient is read where the optimizer is about to be stepped: unscaled, not clipped by the Trainer yet.

    Where the two need not agree nothing is compared: several processes, several optimizers, hooks on gradients, weights
    that moved within the step, gradients that are left over from before it, and batches that are not the loss's.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        loss: The loss that is measured.
        engine: Takes the readings.
        probe: What they are taken on.
    """

    def __init__(
        self,
        trainer: Any,
        pl_module: Any,
        *,
        loss: MeasuredLoss,
        engine: Engine,
        probe: Probe,
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._loss = loss
        self._optimizers = as_list(loss.optimizers)
        self._engine = engine
        self._probe = probe
        self._given = engine.samples.kind == "given"
        self._armed = False
        self._stepped = False  # in the batch before
        self._gradient: Tensor | None = None  # of the measured loss, summed over the step's batches so far
        self._batches = 0
        self._versions: list[tuple[int, float]] = []  # of the parameters that it was taken at
        self._generators: Generators | None = None  # where a claim hangs on their being left alone
        self._states: list[Any] = []
        self._repeats = False
        self._draws = False  # at random

    def before_batch(self, batch: Any, *, read: bool) -> None:
        """Differentiate the measured loss, if the step's gradient will be that of this batch.

        Args:
            batch: The batch.
            read: Whether a reading precedes the step.
        """
        match = self._engine.match
        fresh = self._stepped or all(p.grad is None for p in self._parameters())
        self._stepped = False
        self._armed = match.open and (self._armed or read)
        if not self._armed:
            return
        if self._gradient is not None and (self._batches >= _MOST_BATCHES or self._versions != self._versions_now()):
            self._gradient = None  # no step that we hear of
        elif self._gradient is not None or (fresh and self._is_comparable()):
            self._engine.guard.run(COMPARING, lambda: self._add(batch))

    def stepping(self, optimizer: Any) -> None:
        """Compare with the gradient that an optimizer is about to take."""
        if len(self._optimizers) != 1 or bare_optimizer(optimizer) is not self._optimizers[0]:
            return
        self._stepped = True
        gradient = self._gradient
        self._gradient = None
        if gradient is not None and self._versions == self._versions_now():
            self._armed = False
            self._engine.guard.run(COMPARING, lambda: self._compare(gradient))

    def _is_comparable(self) -> bool:
        if self._trainer.world_size > 1 or len(self._optimizers) != 1 or self._engine.samples.halved:
            return False  # halved: a whole batch does not fit beside the reading
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(self._optimizers[0], "_step_supports_amp_scaling", False):
            return False  # fused: it unscales inside of its step
        if isinstance(self._optimizers[0], Relaxation):
            return False  # each of its evaluations is of another part of the batch
        if self._given and not self._probe.full_batch:
            return False  # of a form that training's batches need not have
        hooked = any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in self._parameters())
        return not hooked and not any(m._backward_hooks or m._backward_pre_hooks for m in self._module.modules())

    def _add(self, batch: Any) -> None:
        if self._gradient is None:
            self._begin(batch)
        elif self._given:
            return  # all of the step's data already
        samples = self._engine.samples
        gradient = measured_gradient(
            self._module,
            self._loss.function,
            samples.on(self._module.device, batch) if self._given else [batch],
            self._parameters(),
            sandbox=self._sandbox(),
            batch_size_fn=self._probe.batch_size_fn,
        )
        self._gradient = gradient if self._gradient is None else self._gradient + gradient
        self._batches += 1

    def _begin(self, batch: Any) -> None:
        self._batches = 0
        self._versions = self._versions_now()
        self._repeats = False
        self._draws = False
        if self._engine.match.suspicious and not self._given and self._steps_are_the_loss():
            self._repeats = is_repeated(self._loss.function, batch, self._sandbox())
            self._draws = not self._repeats
            self._generators = Generators(self._module, leave_out=(self._trainer,)) if self._repeats else None
            self._states = self._generators.states() if self._generators is not None else []

    def _compare(self, gradient: Tensor) -> None:
        params = self._parameters()
        # Lightning divides by the number that it was told, the last step of an epoch included; others are taken to
        # mean the mean over the batches that they took.
        automatic = self._module.automatic_optimization
        batches = self._trainer.accumulate_grad_batches if automatic else self._batches
        share = 1.0 if self._given else 1.0 / batches
        found = agreement(gradient, params, [p.grad for p in params], share)
        generators = self._generators
        repeats = self._repeats and generators is not None and generators.states() == self._states
        self._generators = None
        self._engine.match.add(found, draws=self._draws, repeats=repeats)

    def _steps_are_the_loss(self) -> bool:
        """Whether nothing but the loss can have given the gradients that a step takes."""
        base = next(cls for cls in type(self._module).__mro__ if cls.__name__ == "LightningModule")
        overridden = any(getattr(type(self._module), hook, None) is not getattr(base, hook, None) for hook in _HOOKS)
        others = any(_overrides(callback, hook) for callback in self._trainer.callbacks for hook in _CALLBACK_HOOKS)
        return bool(self._module.automatic_optimization) and not overridden and not others

    def _parameters(self) -> list[Tensor]:
        return trained_parameters(self._optimizers)

    def _sandbox(self) -> TrainerSandbox:
        return TrainerSandbox(self._trainer, self._module)

    def _versions_now(self) -> list[tuple[int, float]]:
        # What is set through `.data` has the same version, but hardly the same norm.
        return [(p._version, float(torch.linalg.vector_norm(p.detach()))) for p in self._module.parameters()]


def _overrides(callback: Any, hook: str) -> bool:
    base = next((cls for cls in type(callback).__mro__ if cls.__name__ == "Callback"), None)
    own = type(callback).__module__.startswith("eos_monitor.")
    return base is not None and not own and getattr(type(callback), hook, None) is not getattr(base, hook, None)
