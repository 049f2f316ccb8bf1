"""Where the batch sharpness settles."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import SGD, Optimizer

from eos_monitor.isolation.twin import as_list
from eos_monitor.limits.thresholds import steps_as


def batch_sharpness_limits(optimizer: Optimizer | Iterable[Optimizer]) -> tuple[float, float] | None:
    """Return where the batch sharpness settles under SGD: 2(1 − β)/lr for small batches, 2(1 + β)/lr for large ones.

    Both are 2/lr without momentum β. Between them the crossover is gradual, and a value there says nothing. Dampening
    d makes heavy ball one with the learning rate (1 − d)·lr.

    Returns:
        Both lines in units of curvature. None where nothing is published: other optimizers, Nesterov momentum,
        ``maximize``, groups that differ in these settings, or a learning rate of zero.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.5)
        >>> batch_sharpness_limits(sgd)
        (10.0, 30.0)

    References:
        A. Andreyev et al., "Momentum Further Constrains Sharpness at the Edge of Stochastic Stability", 2026,
        arXiv 2604.14108.
    """
    optimizers = as_list(optimizer)
    if not optimizers or not all(steps_as(o, SGD) for o in optimizers):
        return None
    groups = [group for o in optimizers for group in o.param_groups]
    if any(group["nesterov"] or group["maximize"] for group in groups):
        return None
    settings = {
        (float(group["lr"]), float(group["momentum"]), float(group["dampening"]) if group["momentum"] else 0.0)
        for group in groups
    }
    lr, momentum, dampening = settings.pop()
    effective = lr * (1 - dampening)
    return None if settings or effective <= 0.0 else (2 * (1 - momentum) / effective, 2 * (1 + momentum) / effective)
