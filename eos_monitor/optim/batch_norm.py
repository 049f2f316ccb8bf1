"""Running statistics of batch normalization at the weights in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recompute_batch_norm(
    module: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Replace the running statistics of all batch normalization layers by those over some batches.

    The optimizers on a smoothed loss evaluate it around the weights that they end with, so that the running
    statistics belong to other weights. Call this before an evaluation; batches count alike, whatever their size.
    Dropout and the like are off meanwhile.

    Args:
        module: Module with the weights to evaluate; without such layers nothing happens.
        batches: Some batches of the training data, on the module's device.
        forward: Runs the module on a batch; by default on the batch, or on the first item of a tuple or list.

    Raises:
        ValueError: If there are no batches.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> recompute_batch_norm(norm, [torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]])])
        >>> norm.running_mean, norm.running_var
        (tensor([2.5000]), tensor([2.]))
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    before = [(norm, norm.momentum, {k: v.clone() for k, v in norm.named_buffers(recurse=False)}) for norm in norms]
    modes = [(m, m.training) for m in module.modules()]
    seen = False
    try:
        module.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # a mean over all batches
        for batch in batches:
            if forward is not None:
                forward(module, batch)
            else:
                module(batch[0] if isinstance(batch, (tuple, list)) else batch)
            seen = True
    finally:
        for m, training in modes:
            m.training = training
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if not seen:
                for name, value in buffers.items():
                    getattr(norm, name).copy_(value)
    if not seen:
        raise ValueError("Expected at least one batch to take statistics over, got none. Is the iterator used up?")
