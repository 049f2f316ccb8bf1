"""Elastic-SGD: workers that train their own copies of the weights, tied to a common reference by springs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eos_monitor.limits.thresholds import Limit, register_critical_curvature
from eos_monitor.optim.relaxation import Closure, Part, Relaxation, descend, put
from eos_monitor.optim.response import NOTE, first_unstable, grows, sgd_limit, spring_map


class ElasticSGD(Relaxation):
    """Descend Σ f(xᵃ) + |xᵃ − x|²/(2γ) by SGD of n workers, in synchronous rounds.

    A step is one round. Each worker takes L evaluations ``g`` of the gradient, each followed by
    ``xᵃ ← xᵃ − η′(g(xᵃ) + (xᵃ − x)/γ)``; then ``x ← x − (η/γ)(x − mean of xᵃ)``. Between steps the parameters hold
    x, the weights to evaluate.

    The workers are in this process, one after the other, so that a step calls its closure ``workers · evaluations``
    times. With ``distributed=True`` each process of the default group has ``workers`` of its own: the first step
    sends the weights of rank 0 to all, and each round ends with an exchange of all copies, summed in the order of
    ranks. Results are then the same bits on all ranks, and those of as many workers in one process.

    Args:
        params: Parameters or parameter groups.
        lr: Step size η′ ≥ 0 of the workers.
        workers: Copies of the weights in this process, n ≥ 1.
        gamma: Width γ > 0 of the smoothing: 1/γ is the stiffness of the springs; ``math.inf`` is no coupling.
        moving_rate: η/γ in [0, 1], the share of the way to the workers' mean that x goes.
        evaluations: L ≥ 1, the evaluations of each worker in a round.
        momentum: Momentum of the workers, in [0, 1).
        nesterov: Whether it is Nesterov's.
        weight_decay: Coupled weight decay, part of f and so taken at xᵃ.
        scoping: Share of γ that is lost with each round.
        distributed: Whether each process of ``torch.distributed``'s default group has workers.
        foreach: Whether to use torch's multi-tensor kernels; by default where SGD does.

    Raises:
        ValueError: If a setting is out of range.

    Note:
        Do not wrap the module in DistributedDataParallel: it would average the workers' gradients. The exchange
        gathers one parameter at a time, world size · ``workers`` copies of it. One worker is SGD, without coupling
        for any ``evaluations`` and with it for one.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> optimizer = ElasticSGD([x], lr=0.5, workers=2, gamma=1.0)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * x.square().sum()  # in training: of the next mini-batch
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item(), x.item(), optimizer.closure_calls
        (0.5, 0.5, 2)

    References:
        Zhang, Choromanska, LeCun, "Deep learning with elastic averaging SGD", 2015, arXiv 1412.6651.
        Chaudhari, Oberman, Osher, Soatto, Carlier, "Deep relaxation", 2017, arXiv 1704.04932, equation 3.
    """

    _ranges = {"gamma": ("a number > 0", lambda v: v > 0)}
    _remedy = "Lower lr or raise gamma."

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        *,
        workers: int = 4,
        gamma: float = 1.0,
        moving_rate: float = 1.0,
        evaluations: int = 1,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        scoping: float = 0.0,
        distributed: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            workers=workers,
            gamma=gamma,
            moving_rate=moving_rate,
            evaluations=evaluations,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            scoping=scoping,
            distributed=distributed,
            foreach=foreach,
        )
        super().__init__(params, defaults)

    @property
    def closure_calls(self) -> int:
        """How often one step calls its closure in this process."""
        return super().closure_calls * int(self.param_groups[0]["workers"])

    def inner_limit(self, group: Mapping[str, Any]) -> float:
        """Return SGD's limit less 1/γ; a lone worker that always starts at x feels no spring."""
        slack = _lone(group) and group["evaluations"] == 1 and group["moving_rate"] == 1
        spring = 0.0 if slack else 1 / float(group["gamma"])
        return sgd_limit(float(group["lr"]), group["momentum"], group["nesterov"]) - spring

    def _relax(self, closure: Closure, parts: Sequence[Part]) -> None:
        settings = self.param_groups[0]
        params = [p for part in parts for p in part.params]
        if settings["distributed"] and not any("replicas" in self.state.get(p, {}) for p in params):
            for part in parts:
                for p, x in zip(part.params, part.anchors, strict=True):
                    dist.broadcast(p, src=0)
                    x.copy_(p)
        for p in params:
            # zeros, because heavy ball's first velocity is the first gradient
            for name in ("replicas", *(["momentum_buffer"] if settings["momentum"] else [])):
                if name not in self.state[p]:
                    copies = p.detach().expand(settings["workers"], *p.shape).clone()
                    self.state[p][name] = copies if name == "replicas" else torch.zeros_like(copies)
        for worker in range(settings["workers"]):
            self._work(closure, parts, worker)
        for part in parts:
            for p, x in zip(part.params, part.anchors, strict=True):
                p.copy_(x.lerp(_mean(self.state[p]["replicas"], settings["distributed"]), part.group["moving_rate"]))

    def _work(self, closure: Closure, parts: Sequence[Part], worker: int) -> None:
        buffers: list[list[Tensor | None]] = []
        for part in parts:
            put(part.params, [self.state[p]["replicas"][worker] for p in part.params])
            momenta = [self.state[p].get("momentum_buffer") for p in part.params]
            buffers.append([None if momentum is None else momentum[worker] for momentum in momenta])
        for number in range(super().closure_calls):
            self._evaluate(closure, worker * super().closure_calls + number)
            for part, buffer in zip(parts, buffers, strict=True):
                group = part.group
                descend(part, buffer, lr=group["lr"], momentum=group["momentum"], nesterov=group["nesterov"])
        for part in parts:
            put([self.state[p]["replicas"][worker] for p in part.params], part.params)


def _mean(replicas: Tensor, distributed: bool) -> Tensor:
    """Return the mean over workers, in an order that does not depend on how they are spread over processes."""
    if distributed:
        gathered = [torch.empty_like(replicas) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, replicas)
        replicas = torch.cat(gathered)
    # From the first one on, so that equal copies have exactly that mean.
    apart = torch.zeros_like(replicas[0])
    for replica in replicas:
        apart += replica - replicas[0]
    return replicas[0] + apart / len(replicas)


@register_critical_curvature(ElasticSGD)
def _elastic(group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]) -> Limit:
    """On a quadratic a round maps (x, mean of workers, velocity) linearly, and the workers' differences by themselves.

    Exact for the full batch and one group: in other bases than the Hessian's, groups do not commute.
    """
    keys = ("lr", "gamma", "moving_rate", "evaluations", "momentum", "nesterov")
    return Limit(_critical(*(group[key] for key in keys), _lone(group)), group["weight_decay"], note=NOTE)


def _lone(group: Mapping[str, Any]) -> bool:
    return bool(group["workers"] == 1 and not group["distributed"])


@lru_cache(maxsize=64)
def _critical(
    lr: float, gamma: float, moving_rate: float, evaluations: int, momentum: float, nesterov: bool, lone: bool
) -> float:
    if lr == 0:
        return math.inf

    def unstable(curvature: Tensor) -> Tensor:
        return grows(spring_map(curvature, lr, gamma, evaluations, momentum, pull=moving_rate, nesterov=nesterov))

    mean = first_unstable(unstable, 1 / lr)
    apart = math.inf if lone else sgd_limit(lr, momentum, nesterov) - 1 / gamma
    return min(mean, max(apart, 1e-12 / lr))  # springs can be too stiff for any curvature
