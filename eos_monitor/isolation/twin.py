"""Copies of optimizers that can be stepped without touching the originals."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from eos_monitor.isolation.sandbox import preserve_rng
from eos_monitor.isolation.wrappers import bare_optimizer

_O = TypeVar("_O", bound=Optimizer)


def twin_optimizer(optimizer: _O, stand_ins: Mapping[Tensor, Tensor]) -> _O:
    """Copy an optimizer with its state onto other parameters; hooks stay behind.

    Args:
        optimizer: Optimizer to copy.
        stand_ins: Parameter -> the tensor that takes its place in the copy.
    """
    # Not by copy.deepcopy(optimizer): Optimizer.__getstate__ forgets what a subclass keeps beside state and groups
    # (LBFGS cannot be copied at all). An instance's own `step` is a scheduler's wrapper around the original.
    memo = {id(live): stand_in for live, stand_in in stand_ins.items()}
    twin = type(optimizer).__new__(type(optimizer))
    memo[id(optimizer)] = twin  # type: ignore[assignment]
    kept = {key: value for key, value in vars(optimizer).items() if key != "step"}
    hooks: dict[str, OrderedDict[int, object]] = {
        key: OrderedDict() for key in kept if key.startswith("_optimizer_") and key.endswith("_hooks")
    }
    twin.__dict__.update(copy.deepcopy({key: value for key, value in kept.items() if key not in hooks}, memo) | hooks)
    return twin


def as_list(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """Return one optimizer, or several, as a list; those inside of wrappers that only pass on."""
    several = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    return [bare_optimizer(optimizer) for optimizer in several]


def trained_parameters(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return the parameters that optimizers train, in ``param_groups`` order: the order of all vectors."""
    return [p for o in optimizers for group in o.param_groups for p in group["params"] if p.requires_grad]


def proposed_update(
    optimizers: Sequence[Optimizer],
    gradient: Tensor,
    *,
    settings: Mapping[str, Any] | None = None,
    loss_at: Callable[[Tensor], tuple[float, Tensor]] | None = None,
) -> Tensor:
    """Return the update that a step of ``optimizers`` would make at a given gradient, ``(n,)``, without making it.

    Args:
        optimizers: Optimizers, one step of each.
        gradient: Gradient in ``param_groups`` order, ``(n,)``.
        settings: What to change in every group (``weight_decay`` ...) for this step.
        loss_at: Loss and gradient at the parameters plus a displacement, ``(n,)``, for steps that need a closure.

    Raises:
        ValueError: If an optimizer is in a mode in which it does not step.
    """
    for optimizer in optimizers:
        if any(group.get("train_mode") is False for group in optimizer.param_groups):
            raise ValueError(f"Expected optimizers in train mode, got {type(optimizer).__name__} in eval mode.")
    params = trained_parameters(optimizers)
    sizes = [p.numel() for p in params]
    stand_ins = {p: p.detach().clone().requires_grad_() for p in params}

    def give(flat: Tensor) -> None:
        for (live, stand_in), part in zip(stand_ins.items(), torch.split(flat, sizes), strict=True):
            stand_in.grad = part.view(live.shape).to(live.dtype)

    def moved() -> Tensor:
        return torch.cat([(stand_in.detach() - live.detach()).reshape(-1) for live, stand_in in stand_ins.items()])

    def closure() -> float:
        assert loss_at is not None
        loss, flat = loss_at(moved())
        give(flat)
        return loss

    give(gradient)
    with preserve_rng(), torch.inference_mode(False), torch.enable_grad():  # some optimizers draw noise
        for optimizer in optimizers:
            twin = twin_optimizer(optimizer, stand_ins)
            for group in twin.param_groups:
                group.update(settings or {})
            if loss_at is not None and needs_closure(optimizer):
                twin.step(closure)
            else:
                twin.step()
    return moved()


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer evaluates the loss itself, at several points a step perhaps."""
    parameter = inspect.signature(inspect.unwrap(type(optimizer).step)).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty
