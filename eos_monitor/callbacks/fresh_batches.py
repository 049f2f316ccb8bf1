"""The optimizers on a smoothed loss under Lightning: a mini-batch for each evaluation, and what they cannot bear."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from eos_monitor.callbacks._compat import Callback, MisconfigurationException
from eos_monitor.isolation.batches import split_batch
from eos_monitor.optim.relaxation import Relaxation


def fresh_batch(pl_module: Any, batch: Any) -> Any:
    """Return the part of a batch that is for the evaluation that is running.

    Under automatic optimization Lightning hands one batch to the closure that the optimizer calls L times. Loaded
    with L times the batch size and cut into L parts, it is a fresh mini-batch for each::

        class Net(LightningModule):
            def training_step(self, batch, batch_idx):
                images, labels = fresh_batch(self, batch)
                return F.cross_entropy(self(images), labels)

            def configure_optimizers(self):
                return EntropySGD(self.parameters())  # evaluations=20

        loader = DataLoader(data, batch_size=20 * 64, shuffle=True, drop_last=True)

    Outside of such a step, so in validation, in a monitor's reading, or with another optimizer, the batch stays whole.

    Args:
        pl_module: The LightningModule that trains.
        batch: Batch of the training loader, of any structure whose tensors share their first dimension.

    Raises:
        MisconfigurationException: If the Trainer's settings contradict the optimizer (see :class:`RelaxationGuard`).
        ValueError: If the batch cannot be cut into as many parts.
    """
    running = [o for o in _relaxations(pl_module.trainer) if o.evaluation is not None]
    if not running:
        return batch
    (optimizer,) = running
    _refuse(pl_module.trainer, [optimizer])
    parts = split_batch(batch, optimizer.closure_calls)
    if parts is None:
        raise ValueError(
            f"Expected a batch that can be cut into {optimizer.closure_calls} mini-batches along a first dimension "
            "common to all its tensors, got one that cannot. Load the wanted batch size times "
            f"{optimizer.closure_calls}, with drop_last=True."
        )
    assert optimizer.evaluation is not None
    return parts[optimizer.evaluation]


class RelaxationGuard(Callback):
    """Refuses, before the first step, trainer settings under which the optimizers on a smoothed loss go wrong.

    - ``accumulate_grad_batches`` above 1, also by GradientAccumulationScheduler. Lightning then evaluates the first
      batches before the optimizer's step, which alone moves the weights to where they are to be evaluated, and does
      not clear the gradients between the evaluations of the step: they would be summed up over different weights.
    - Precision with a gradient scaler (``"16-mixed"``). Lightning then evaluates once by itself and calls the
      optimizer without a closure.
    - With several processes, noise without a generator: the processes would step to different weights, while DDP
      averages their gradients. Give each the same seeded ``generator``.
    - With several processes, ``ElasticSGD(distributed=True)``: its workers need gradients of their own.

    Without one of these optimizers it does nothing. Under manual optimization, ``optimizer.step(closure)`` is the
    user's own and nothing is refused.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the trainer.

        Raises:
            MisconfigurationException: If a setting contradicts one of the optimizers.
        """
        if pl_module.automatic_optimization:
            _refuse(trainer, _relaxations(trainer))


def _relaxations(trainer: Any) -> list[Relaxation]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Relaxation)]


def _refuse(trainer: Any, optimizers: Iterable[Relaxation]) -> None:
    for optimizer in optimizers:
        name = type(optimizer).__name__
        calls = optimizer.closure_calls
        scheduled = (
            factor
            for callback in trainer.callbacks
            for factor in getattr(callback, "scheduling", {}).values()
            if type(callback).__name__ == "GradientAccumulationScheduler"
        )
        accumulated = max([trainer.accumulate_grad_batches, *scheduled])
        if accumulated > 1:
            raise MisconfigurationException(
                f"Expected accumulate_grad_batches=1 with {name}, got {accumulated}: each of the {calls} evaluations "
                "in a step is at other weights, and Lightning would sum their gradients up. Load larger batches "
                f"instead: fresh_batch cuts them into {calls} mini-batches."
            )
        if trainer.world_size > 1 and optimizer.draws_noise and optimizer.generator is None:
            raise MisconfigurationException(
                f"Expected {name} to have a generator in {trainer.world_size} processes, got None: each process would "
                "draw other noise and step to other weights. Pass generator=torch.Generator(device).manual_seed(0)."
            )
        if trainer.world_size > 1 and optimizer.param_groups[0].get("distributed"):
            raise MisconfigurationException(
                f"Expected {name} to have its workers in this process under a Trainer with {trainer.world_size} "
                "processes, got distributed=True: the Trainer averages the gradients that its workers need apart. Run "
                "it in a plain loop, or with distributed=False."
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"Expected a precision without gradient scaler with {name}, got {trainer.precision!r}: Lightning then "
                "calls the optimizer without its closure. Use 'bf16-mixed' or '32-true'."
            )
