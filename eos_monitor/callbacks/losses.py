"""The loss that a monitor measures: the user's function, the module's own, or its training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from eos_monitor.callbacks._compat import MisconfigurationException
from eos_monitor.isolation.parted_loss import assigned
from eos_monitor.isolation.sandbox import LossFn

# What users pass. Any, not Tensor: LightningCLI would refuse a function that does not say what it returns.
OneLoss = Callable[[Any, Any], Any]
GivenLoss = OneLoss | dict[int, OneLoss]


class _TrainingStepLoss:
    """The module's own training step as a loss function."""

    def __init__(self, takes_batch_idx: bool) -> None:
        self._takes_batch_idx = takes_batch_idx

    def __call__(self, pl_module: Any, batch: Any) -> Tensor:
        output = pl_module.training_step(*((batch, 0) if self._takes_batch_idx else (batch,)))
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            raise RuntimeError("Expected training_step to return a loss, got None.")
        return loss  # type: ignore[no-any-return]


def _curvature_loss(pl_module: Any, batch: Any) -> Tensor:
    return pl_module.curvature_loss(batch)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MeasuredLoss:
    """The loss that a monitor measures, and where it comes from.

    Attributes:
        function: The loss.
        name: Where it comes from.
        given: As it was given: a function, or one for each of some optimizers.
        optimizers: Those whose parameters it is measured over, once they are known.
    """

    function: LossFn
    name: str
    given: GivenLoss
    optimizers: Sequence[Any] = ()

    def of(self, optimizers: Sequence[Any]) -> MeasuredLoss:
        """Return the loss as it is measured in a fit with these optimizers.

        Raises:
            MisconfigurationException: If it was given for one that is not there.
        """
        try:
            function, own = assigned(self.given, optimizers)
        except ValueError as error:
            raise MisconfigurationException(f"EdgeOfStabilityMonitor: {error}") from error
        return replace(self, function=function, optimizers=own)


def resolve_loss(loss_fn: GivenLoss | None, pl_module: Any) -> MeasuredLoss:
    """Return the loss that is to be measured.

    Raises:
        MisconfigurationException: If only a training step is there and it cannot be run again.
    """
    if loss_fn is not None:
        first = next(iter(loss_fn.values()), _curvature_loss) if isinstance(loss_fn, Mapping) else loss_fn
        return MeasuredLoss(first, "loss_fn", loss_fn)
    if callable(getattr(pl_module, "curvature_loss", None)):
        return MeasuredLoss(_curvature_loss, "curvature_loss", _curvature_loss)
    remedy = "Pass EdgeOfStabilityMonitor(loss_fn=...) or define curvature_loss(self, batch) on the module."
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "EdgeOfStabilityMonitor expected a loss that can be evaluated without stepping, got a training_step under "
            f"manual optimization. {remedy}"
        )
    names = list(inspect.signature(pl_module.training_step).parameters)
    if "dataloader_iter" in names:
        raise MisconfigurationException(
            "EdgeOfStabilityMonitor expected a training_step of one batch, got one that draws from dataloader_iter, "
            f"which would consume the user's data. {remedy}"
        )
    own = _TrainingStepLoss(len(names) > 1)
    return MeasuredLoss(own, "training_step", own)
