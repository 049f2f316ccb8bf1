"""The exact tier: products with a layer's own diagonal block of the Hessian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eos_monitor.cfl.objective import Objective

_KEPT = 4  # gradient graphs; with more batches they are rebuilt at every product


class HessianBlocks:
    r"""Diagonal blocks :math:`\nabla^2_{W_l}` of the mean loss, for several weights from one gradient graph.

    A graph for each layer would cost half as much again. To be used inside the entered sandbox; with more than four
    batches the graphs are rebuilt, one at a time, at every product.

    Args:
        objective: The mean loss.
        weights: Parameters whose blocks are wanted.
    """

    def __init__(self, objective: Objective, weights: Sequence[Tensor]) -> None:
        self._objective = objective
        self._weights = list(weights)
        self._kept: dict[int, list[tuple[Tensor, Tensor | None]]] = {}
        self.products = 0

    def matvec(self, i: int, v: Tensor) -> Tensor:
        """Return the block of weight ``i`` times ``v``, ``(n,)``."""
        self.products += 1
        total = torch.zeros_like(v)
        for b, share in enumerate(self._objective.shares):
            alias, gradient = self._gradient(b, i)
            if gradient is None or not gradient.requires_grad:
                continue  # unused, or linear: this block is zero
            (product,) = torch.autograd.grad(
                gradient, alias, v.view(alias.shape).to(alias.dtype), retain_graph=True, allow_unused=True
            )
            if product is not None:
                total += share * product.reshape(-1)
        return total

    def _gradient(self, b: int, i: int) -> tuple[Tensor, Tensor | None]:
        if len(self._objective.batches) > _KEPT:
            return self._record(b, [self._weights[i]])[0]
        if b not in self._kept:
            self._kept[b] = self._record(b, self._weights)
        return self._kept[b][i]

    def _record(self, b: int, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        aliases = [w.detach().requires_grad_() for w in weights]
        stand_ins = dict(zip(weights, aliases, strict=True))
        loss = self._objective.evaluate(b, stand_ins)
        if not loss.requires_grad:
            return [(alias, None) for alias in aliases]
        gradients = torch.autograd.grad(loss.reshape(()), aliases, create_graph=True, allow_unused=True)
        return list(zip(aliases, gradients, strict=True))
