"""Losses that optimizers have of their own, as one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from eos_monitor.isolation.wrappers import bare_optimizer

NEEDS_ONE_LOSS = (
    "It needs one loss, and several optimizers have one each: pass the monitor loss_fn={position: loss_fn}."
)


class PartedLoss:
    """The sum of the losses of several optimizers, each a function of that optimizer's parameters alone.

    The others enter each loss as constants, as they do in its training; so the Hessian is block diagonal, with a block
    an optimizer. A sandbox evaluates it so.

    Args:
        losses: ``loss(module, batch)`` -> scalar mean loss, one an optimizer.
        optimizers: The optimizers, read anew at each evaluation: they may be given more parameters.
        names: What they are called.
    """

    def __init__(
        self, losses: Sequence[Callable[[Any, Any], Tensor]], optimizers: Sequence[Optimizer], names: Sequence[str]
    ) -> None:
        self.losses = tuple(losses)
        self.names = tuple(names)
        self._optimizers = tuple(optimizers)

    def __call__(self, module: Any, batch: Any) -> Tensor:
        """Return the sum, all parameters being what they are."""
        return sum((loss(module, batch).reshape(()) for loss in self.losses[1:]), self.losses[0](module, batch))

    def parts(
        self, parameters: Mapping[Tensor, Tensor]
    ) -> list[tuple[Callable[[Any, Any], Tensor], dict[Tensor, Tensor]]]:
        """Return each loss with those of the stand-ins that its optimizer trains."""
        parts = []
        for loss, optimizer in zip(self.losses, self._optimizers, strict=True):
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            parts.append((loss, {live: stand_in for live, stand_in in parameters.items() if id(live) in own}))
        return parts


def assigned(
    loss_fn: Callable[[Any, Any], Tensor] | Mapping[int, Callable[[Any, Any], Tensor]], optimizers: Sequence[Optimizer]
) -> tuple[Callable[[Any, Any], Tensor], list[Optimizer]]:
    """Return a loss as one function, and the optimizers whose parameters it is measured over.

    Args:
        loss_fn: One loss for all optimizers, or position of an optimizer -> its own.
        optimizers: All of them.

    Raises:
        ValueError: If there is no optimizer at a position, or no loss.
    """
    if not isinstance(loss_fn, Mapping):
        return loss_fn, list(optimizers)
    several = [bare_optimizer(optimizer) for optimizer in optimizers]
    places = sorted(loss_fn)
    if not places or places[0] < 0 or places[-1] >= len(several):
        raise ValueError(
            f"Expected `loss_fn` with positions of the {len(several)} optimizers, from 0 on, got {places}."
        )
    own = [several[place] for place in places]
    losses = [loss_fn[place] for place in places]
    names = [f"optimizer {place} ({type(several[place]).__name__})" for place in places]
    return (losses[0] if len(losses) == 1 else PartedLoss(losses, own, names)), own


def told(loss_fn: Any, optimizers: Sequence[Optimizer]) -> str | None:
    """Return what is measured of several optimizers, in words; None for one."""
    if len(optimizers) == 1:
        return None
    names = [f"{place} ({type(bare_optimizer(optimizer)).__name__})" for place, optimizer in enumerate(optimizers)]
    if not isinstance(loss_fn, Mapping):
        return (
            f"one loss is measured over the parameters of all {len(names)} optimizers, {', '.join(names)}, as one; "
            "where they have losses of their own, pass loss_fn={0: ..., 1: ...}, by position: each is then measured "
            "over its optimizer's own parameters"
        )
    measured = ", ".join(name for place, name in enumerate(names) if place in loss_fn)
    rest = ", ".join(name for place, name in enumerate(names) if place not in loss_fn)
    return f"measured over their own parameters: optimizer {measured}; not measured: {rest or 'none'}"
