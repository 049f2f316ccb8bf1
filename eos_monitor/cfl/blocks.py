"""The exact tier: products with a layer's own diagonal block of the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eos_monitor.cfl.objective import Objective
from eos_monitor.curvature.audit import NEARLY_INVARIANT, Audit
from eos_monitor.curvature.lanczos import Spectrum, lanczos_recycled

_KEPT = 4  # gradient graphs; with more batches they are rebuilt at every product
# A solve that ends within its start, in a space that is nearly invariant, or at the floor of decay may have missed the
# top.
_LEAST_AUDIT = 3
_MOST_AUDIT = 14
_NEAR = 5e-3


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


@dataclass(frozen=True)
class ScaledBlock:
    """A block in the coordinates of its limit, C^-½ (H + W) C^-½, as an operator.

    Attributes:
        matvec: Its products, ``(n,)``.
        weight: The weight.
        floor: Largest eigenvalue of the decay alone.
    """

    matvec: Callable[[Tensor], Tensor]
    weight: Tensor
    floor: float

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return self.weight.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the vectors."""
        return basis_dtype(self.weight)

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self.weight.device

    def solve(
        self, start: Tensor | None, products: int, rtol: float, random: torch.Generator, *, deep: bool
    ) -> Spectrum:
        """Return the top pair, from ``start`` or a random vector.

        Args:
            start: Vector to start from, ``(n,)``.
            products: Most products, without those that look beyond a solve that has converged.
            rtol: Relative residual to reach.
            random: Source of random vectors.
            deep: Whether to look on until nothing larger is left, and not for three products only.
        """
        most = _MOST_AUDIT if deep else _LEAST_AUDIT

        def audit(spectrum: Spectrum, inside: bool, leak: float) -> Audit | None:
            theta = float(spectrum.eigenvalues[0])
            closed = inside or leak <= NEARLY_INVARIANT * abs(theta - self.floor)
            if not closed and theta > self.floor + _NEAR * abs(theta):
                return None
            return Audit(self._random_vector(random), 1.0 / self.size, _LEAST_AUDIT, most, _NEAR, 0.0)

        return lanczos_recycled(
            self,
            (self._random_vector(random) if start is None else start.to(self.dtype))[:, None],
            k=1,
            rtol=rtol,
            atol=1e-6 * abs(self.floor),
            max_matvecs=products + most,
            budget=products,
            generator=random,
            audit=audit,
        ).spectrum

    def _random_vector(self, random: torch.Generator) -> Tensor:
        return torch.randn(self.size, generator=random, dtype=self.dtype, device="cpu").to(self.device)


def basis_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of a basis of the weight's space; one in half precision would not be one."""
    return torch.promote_types(weight.dtype, torch.float32)
