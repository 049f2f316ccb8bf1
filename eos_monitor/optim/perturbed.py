"""Steps changed by no more than rounding: how far does a run depend on its last bits?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from eos_monitor.limits.thresholds import register_critical_curvature
from eos_monitor.optim.checked_optimizer import GroupwiseOptimizer
from eos_monitor.optim.response import sgd_limit

_O = TypeVar("_O", bound=Optimizer)


class PerturbedSGD(GroupwiseOptimizer):
    """SGD with its update written as (η/k)·(k d), where d is the gradient or, with momentum, the momentum vector.

    Equal in exact arithmetic, this differs from SGD by rounding if k is not a power of two: the smallest perturbation
    that the floating-point format can express, in every step anew. For powers of two it is SGD, bit for bit.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate η ≥ 0.
        momentum: γ ≥ 0.
        weight_decay: Coupled (L2) weight decay ≥ 0.
        k: Integer ≥ 1; the paper compares odd ones.
        nesterov: Use Nesterov momentum (torch's form); d is then g + γ v.
        maximize: Maximize the objective.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Y. Sun, D. Lao, G. Sundaramoorthi, A. Yezzi, Surprising Instabilities in Training Deep Networks and a
        Theoretical Analysis, NeurIPS 2022, arXiv 2206.02001, section 4.1.

    Example:
        >>> import torch
        >>> def trained(k):
        ...     x = torch.nn.Parameter(torch.linspace(0.1, 1, 50))
        ...     optimizer = PerturbedSGD([x], lr=0.1, k=k)
        ...     for _ in range(20):
        ...         optimizer.zero_grad()
        ...         (x**4).sum().backward()
        ...         optimizer.step()
        ...     return x.detach()
        >>> torch.equal(trained(4), trained(1)), torch.equal(trained(3), trained(1))
        (True, False)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        k: int = 3,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "k": k,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"Expected {name} ≥ 0, got {group[name]}.")
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("Expected momentum > 0 with nesterov=True, got 0.")
        _check_factor(group["k"])

    def _step(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.grad is not None:
                self._move(p, p.grad, group)

    def _move(self, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        direction = -grad if group["maximize"] else grad
        if group["weight_decay"]:
            direction = direction.add(p, alpha=group["weight_decay"])
        if momentum := group["momentum"]:
            state = self.state[p]
            velocity = state.get("momentum_buffer")
            if velocity is None:
                velocity = direction.detach().clone()
                state["momentum_buffer"] = velocity
            else:
                velocity.mul_(momentum).add_(direction)
            direction = direction.add(velocity, alpha=momentum) if group["nesterov"] else velocity
        p.add_(direction * group["k"], alpha=-float(group["lr"]) / group["k"])


def perturbed(optimizer: _O, k: int) -> _O:
    """Let an optimizer see its gradients as (1/k)·(k g), which differs from g by rounding if k is no power of two.

    For powers of two nothing changes, bit for bit. The gradients are changed in place, just before the step or, where
    the step takes a closure, at the end of each of its calls. Unlike in :class:`PerturbedSGD` it is the gradient that
    is perturbed and not the update, which optimizers do not show.

    Args:
        optimizer: Any optimizer.
        k: Integer ≥ 1.

    Returns:
        The same optimizer, with a hook on its step; like all hooks of optimizers it is not copied by ``copy.deepcopy``
        or pickled.

    Raises:
        ValueError: If k is not a positive integer.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = perturbed(torch.optim.Adam([x], lr=0.1), k=3)
        >>> type(optimizer).__name__
        'Adam'
    """
    _check_factor(k)

    def perturb() -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.detach().mul_(k).mul_(1 / k)

    def before_step(
        stepping: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        itself, *rest = args
        closure = rest.pop(0) if rest else kwargs.get("closure")
        if closure is None:
            perturb()
            return None

        def and_perturb() -> Any:
            loss = closure()
            perturb()
            return loss

        return (itself, *rest), {**kwargs, "closure": and_perturb}

    optimizer.register_step_pre_hook(before_step)
    return optimizer


def _check_factor(k: object) -> None:
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"Expected k to be an integer ≥ 1, got {k!r}.")


@register_critical_curvature(PerturbedSGD)
def _as_without_perturbation(
    group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]
) -> tuple[float, float, float]:
    """That of SGD: 2(1+γ) or, for Nesterov, (2+2γ)/(1+2γ)."""
    limit = sgd_limit(group["lr"], group["momentum"], group["nesterov"])
    return limit, group["weight_decay"], sgd_limit(1.0, group["momentum"], group["nesterov"])
