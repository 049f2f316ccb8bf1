"""Nesterov SGD whose velocity diffuses: an accelerated PDE, discretized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _default_to_fused_or_foreach
from torch.optim.sgd import sgd

from eos_monitor.limits.thresholds import register_critical_curvature
from eos_monitor.optim.checked_optimizer import GroupwiseOptimizer
from eos_monitor.optim.diffusion import (
    BOUNDARIES,
    LIMITS,
    Axes,
    add_neighbours,
    largest_eigenvalue,
    resolve_axes,
    shifts,
    stable_diffusion,
)
from eos_monitor.optim.response import sgd_limit


class Diffused(NamedTuple):
    """A parameter whose velocity diffuses in this step."""

    param: Tensor
    grad: Tensor
    velocity: Tensor
    axes: tuple[int, ...]
    beta: float


class APDE(GroupwiseOptimizer):
    r"""Nesterov SGD with velocity diffusion.

    Each step, with g = ∇J(θ) + weight_decay·θ, is

    .. math:: v ← γ v + β ∇²v + g, \qquad θ ← θ − η (g + γ v + β ∇²v)

    with the discrete Laplacian ∇² along some axes of each tensor (equations 6 and 7 of the paper). Without diffusion
    this is ``torch.optim.SGD(nesterov=True)``, bit for bit.

    Settings can differ between groups; :func:`diffusion_groups` builds the paper's. β is recomputed in each step from
    ``diffusion`` and ``momentum``, so that it follows a scheduler of either.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate η ≥ 0.
        momentum: γ in [0, 1].
        weight_decay: Coupled (L2) weight decay ≥ 0.
        diffusion: β as a share of the largest stable one, in [0, 1]. At 1 the highest frequency of the velocity
            neither grows nor decays, and noise adds up in it: 0.9 to 0.99 keeps a margin.
        axes: Axes of the Laplacian: ``"out"`` (0), ``"in"`` (1), ``"spatial"`` (from 2 on), integers, or several.
        boundary: ``"neumann"``, the edge values repeated outside, or ``"periodic"`` (the paper has both).
        limit: What ``diffusion`` is a share of: ``"exact"``, from the spectrum of this grid, or ``"paper"``,
            β_max = (1 + γ)/4N with N axes. Exact is larger where the highest frequency does not fit: by 4/3 for 3×3.
        time_step_reduction: m ≥ 1, the paper's way to a larger diffusion b: the time step Δt is divided by m at the
            same damping, η and γ are recomputed, and m times the b is stable. The step then uses these, the group
            keeps its own. It also divides the effective learning rate η/(1 − γ) by m.
        allow_unstable: Accept ``diffusion`` above 1, at which the velocity grows without bound.
        maximize: Maximize the objective.
        foreach: Step all tensors together, one operation at a time (with memory for one more copy of the diffused
            tensors). None: where torch's own optimizers do, which is on accelerators.

    Raises:
        ValueError: If a setting is out of its range, or a tensor lacks the axes.
        RuntimeError: In a step, if the gradient of a diffused tensor is sparse.

    Note:
        The Laplacian sees the shape that a parameter has. Flattened parameters (FSDP1) and shards do not have their
        own shape, and are not supported.

        Its critical curvature is Nesterov's, (2 + 2γ)/((1 + 2γ) η). A mode −l of the Laplacian has the momentum
        μ = γ − βl in [−1, γ] and its edge at 2(1 + μ)/((1 + 2μ) η), or at (1 + 1/\|μ\|)/η if that is lower and μ < 0;
        the smallest of these is at μ = γ, where there is no diffusion. So the value is exact where the sharpest
        direction of the Hessian is constant along the axes, and a lower bound elsewhere.

        The paper calls β ≤ β_max sufficient; it is the condition without a gradient.

    References:
        Y. Sun, D. Lao, G. Sundaramoorthi, A. Yezzi, Accelerated PDEs for Construction and Theoretical Analysis of an
        SGD Extension, 2021. In (20) the sign of cos − 1 is to be reversed.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = APDE([weight], lr=0.1, diffusion=0.95)
        >>> (weight * torch.arange(4.0)).sum().backward()
        >>> optimizer.step()
        >>> weight.detach()[-1] < weight.detach()[0]
        tensor(True)
    """

    _spare: dict[tuple[torch.device, torch.dtype], Tensor]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        diffusion: float = 0.0,
        axes: Axes = "out",
        boundary: str = "neumann",
        limit: str = "exact",
        time_step_reduction: float = 1.0,
        allow_unstable: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "diffusion": diffusion,
            "axes": axes,
            "boundary": boundary,
            "limit": limit,
            "time_step_reduction": time_step_reduction,
            "allow_unstable": allow_unstable,
            "maximize": maximize,
            "foreach": foreach,
        }
        self._spare = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._spare = {}

    def _check(self, group: dict[str, Any]) -> None:
        ranges = {"lr": math.inf, "momentum": 1.0, "weight_decay": math.inf}
        ranges["diffusion"] = math.inf if group["allow_unstable"] else 1.0
        for name, highest in ranges.items():
            if not 0 <= group[name] <= highest:
                remedy = "; a larger share grows without bound: allow_unstable=True" if name == "diffusion" else ""
                raise ValueError(f"Expected {name} in [0, {highest:g}], got {group[name]}{remedy}.")
        if not group["time_step_reduction"] >= 1:
            raise ValueError(f"Expected time_step_reduction ≥ 1, got {group['time_step_reduction']}.")
        for name, values in (("boundary", BOUNDARIES), ("limit", LIMITS)):
            if group[name] not in values:
                raise ValueError(f"Expected {name} to be one of {', '.join(map(repr, values))}, got {group[name]!r}.")
        if group["diffusion"]:
            for p in group["params"]:
                resolve_axes(group["axes"], p.shape)

    def _step(self, group: dict[str, Any]) -> None:
        lr, momentum = reduced(float(group["lr"]), float(group["momentum"]), float(group["time_step_reduction"]))
        plain: list[Tensor] = []
        diffused: list[Diffused] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            axes, beta = _diffusion(group, p.shape, momentum)
            if beta == 0:
                plain.append(p)
                continue
            if p.grad.is_sparse:
                raise RuntimeError(
                    "Expected dense gradients where velocities diffuse, got a sparse one: set diffusion=0."
                )
            state = self.state[p]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)
            diffused.append(Diffused(p, p.grad, state["momentum_buffer"], axes, beta))

        self._step_plain(plain, group, lr, momentum)
        foreach = group["foreach"]
        if foreach is None:
            _, foreach = _default_to_fused_or_foreach([d.param for d in diffused], differentiable=False)
        if foreach:
            _step_together(diffused, group, lr, momentum)
        else:
            self._step_each(diffused, group, lr, momentum)

    def _step_plain(self, params: list[Tensor], group: dict[str, Any], lr: float, momentum: float) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        velocities = [self.state[p].get("momentum_buffer") if momentum else None for p in params]
        sgd(
            params,
            grads,
            velocities,
            has_sparse_grad=any(g.is_sparse for g in grads),
            foreach=group["foreach"],
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=True,
            maximize=group["maximize"],
        )
        if momentum:
            for p, velocity in zip(params, velocities, strict=True):
                self.state[p]["momentum_buffer"] = velocity

    def _step_each(self, diffused: Sequence[Diffused], group: Mapping[str, Any], lr: float, momentum: float) -> None:
        """Step tensor by tensor, with two additions a neighbourhood: three passes over memory for v, four for θ."""
        for p, grad, v, axes, beta in diffused:
            g = -grad if group["maximize"] else grad
            if group["weight_decay"]:
                g = g.add(p, alpha=group["weight_decay"])
            ahead = self._like(v)
            # γv + β∇²v = (γ − 2Nβ) v + β · (sum of the 2N neighbours)
            own = momentum - 2 * len(axes) * beta
            add_neighbours(g, v, axes, group["boundary"], beta, out=ahead)
            torch.add(ahead, v, alpha=own, out=v)
            add_neighbours(g, v, axes, group["boundary"], beta, out=ahead)
            p.add_(ahead.add_(v, alpha=own), alpha=-lr)

    def _like(self, v: Tensor) -> Tensor:
        """Return memory of the shape of ``v``, which all share: page faults of fresh memory double a step's time."""
        if not v.is_contiguous():
            return torch.empty_like(v)
        key = (v.device, v.dtype)
        spare = self._spare.get(key)
        if spare is None or spare.numel() < v.numel():
            spare = v.new_empty(v.numel())
            self._spare[key] = spare
        return spare[: v.numel()].view(v.shape)


def _step_together(diffused: Sequence[Diffused], group: Mapping[str, Any], lr: float, momentum: float) -> None:
    """Step all tensors of one kind by the same few kernels."""
    kinds: dict[object, list[Diffused]] = {}
    for d in diffused:
        kinds.setdefault((d.axes, d.beta, d.param.device, d.param.dtype), []).append(d)
    for alike in kinds.values():
        params = [d.param for d in alike]
        grads = [d.grad for d in alike]
        velocities = [d.velocity for d in alike]
        if group["maximize"]:
            grads = [*torch._foreach_neg(grads)]
        if group["weight_decay"]:
            grads = [*torch._foreach_add(grads, params, alpha=group["weight_decay"])]
        moved = _moved_together(alike, grads, group["boundary"], momentum)
        torch._foreach_copy_(velocities, moved)
        del moved  # before its successor, so that there is one at a time
        moved = _moved_together(alike, grads, group["boundary"], momentum)
        torch._foreach_add_(params, moved, alpha=-lr)


def _moved_together(
    alike: Sequence[Diffused], grads: list[Tensor], boundary: str, momentum: float
) -> tuple[Tensor, ...]:
    """Return g + γv + β∇²v of each."""
    velocities = [d.velocity for d in alike]
    axes = alike[0].axes
    beta = alike[0].beta
    moved = torch._foreach_mul(velocities, momentum - 2 * len(axes) * beta)
    for axis in axes:
        for slices in zip(*(shifts(v.shape[axis], boundary) for v in velocities), strict=True):
            to = [m.narrow(axis, at, length) for m, (at, _, length) in zip(moved, slices, strict=True)]
            origin = [v.narrow(axis, at, length) for v, (_, at, length) in zip(velocities, slices, strict=True)]
            torch._foreach_add_(to, origin, alpha=beta)
    torch._foreach_add_(moved, grads)
    return moved


def reduced(lr: float, momentum: float, reduction: float) -> tuple[float, float]:
    """Return the learning rate and momentum at the time step Δt / m and the same damping a."""
    if reduction == 1:
        return lr, momentum
    damped = 2 * (1 - momentum) / (1 + momentum) / reduction  # a Δt / m
    return 4 * lr / (reduction**2 * (1 + momentum) * (2 + damped)), (2 - damped) / (2 + damped)


class Physical(NamedTuple):
    """Coefficients of ∂²u/∂t² + a ∂u/∂t = −∇U + b ∇² ∂u/∂t, and the time step of its discretization."""

    time_step: float
    damping: float
    diffusivity: float


def to_physical(lr: float, momentum: float, beta: float = 0.0) -> Physical:
    """Return Δt, a and b of the damped wave equation that a learning rate, momentum and β discretize.

    Args:
        lr: η > 0.
        momentum: γ in [0, 1].
        beta: Coefficient β of the Laplacian.

    Returns:
        Δt = √(2η/(1 + γ)), a = (2 − 2γ)/√(2η(1 + γ)), b = β (2 + aΔt)/(2Δt) (equations 8 and 9 of the paper).

    Raises:
        ValueError: If lr is not positive.

    Example:
        >>> [round(value, 6) for value in to_physical(lr=0.2, momentum=0.9, beta=0.475)]
        [0.458831, 0.229416, 1.089725]
    """
    if lr <= 0:
        raise ValueError(f"Expected lr > 0, got {lr}: without a time step there is no equation.")
    time_step = math.sqrt(2 * lr / (1 + momentum))
    damping = (2 - 2 * momentum) / math.sqrt(2 * lr * (1 + momentum))
    return Physical(time_step, damping, beta * (2 + damping * time_step) / (2 * time_step))


def from_physical(time_step: float, damping: float, diffusivity: float = 0.0) -> tuple[float, float, float]:
    """Return lr, momentum and β of the semi-implicit scheme: the inverse of :func:`to_physical`.

    Args:
        time_step: Δt > 0.
        damping: a ≥ 0; aΔt ≤ 2 for a momentum ≥ 0.
        diffusivity: b ≥ 0.

    Returns:
        η = 2Δt²/(2 + aΔt), γ = (2 − aΔt)/(2 + aΔt), β = 2bΔt/(2 + aΔt) (equation 8). The ``diffusion`` of
        :class:`APDE` is β / :func:`stable_diffusion`.
    """
    scale = 2 + damping * time_step
    return 2 * time_step**2 / scale, (2 - damping * time_step) / scale, 2 * diffusivity * time_step / scale


def _diffusion(group: Mapping[str, Any], shape: Sequence[int], momentum: float) -> tuple[tuple[int, ...], float]:
    """Return the axes along which a velocity diffuses, and β."""
    if not group["diffusion"]:
        return (), 0.0
    axes = resolve_axes(group["axes"], shape)
    if not axes:
        return (), 0.0
    return axes, group["diffusion"] * stable_diffusion(shape, axes, momentum, group["boundary"], group["limit"])


@register_critical_curvature(APDE)
def _lowest_over_modes(
    group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]
) -> tuple[float, float, float] | str:
    """Nesterov's (2+2γ)/(1+2γ) at the reduced time step, the smallest over the modes of the Laplacian."""
    unit, momentum = reduced(1.0, group["momentum"], group["time_step_reduction"])  # the step uses unit · lr
    axes, beta = _diffusion(group, param.shape, momentum)
    highest = largest_eigenvalue(tuple(param.shape[i] for i in axes), group["boundary"]) if axes else 0.0
    if beta * highest > (1 + momentum) * (1 + 1e-9):
        return "its diffusion lets the velocity grow without any curvature"
    threshold = sgd_limit(unit, momentum, nesterov=True)
    return threshold / group["lr"] if group["lr"] > 0 else math.inf, group["weight_decay"], threshold
