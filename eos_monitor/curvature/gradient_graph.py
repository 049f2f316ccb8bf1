"""The gradient of one batch's loss, recorded so that it can be differentiated again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class GradientGraph:
    """The gradient of one batch's loss, with the graph to differentiate it again.

    Args:
        loss: The loss, a scalar.
        aliases: Tensors that stand for the parameters in it.
        params: The parameters.
        dtype: Floating-point type of what is returned.
        device: Device of what is returned.

    Attributes:
        loss: The loss.
        unused: Share of the coordinates that the loss does not depend on.
        reached: For each parameter, whether the loss depends on it.
    """

    def __init__(
        self, loss: Tensor, aliases: list[Tensor], params: list[Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.loss = float(loss.detach())
        self._aliases = aliases
        self._params = params
        self._dtype = dtype
        self._device = device
        self._versions = [p._version for p in params]
        # Not materialize_grads: it would turn reentrant checkpointing into a Hessian of silent zeros.
        gradients = torch.autograd.grad(loss, aliases, create_graph=True, allow_unused=True)
        self.reached = [g is not None for g in gradients]
        used = sum(p.numel() for p, reached in zip(params, self.reached, strict=True) if reached)
        self.unused = 1.0 - used / sum(p.numel() for p in params)
        if used == 0:
            raise RuntimeError(
                "Expected a loss that depends on the parameters, got one that uses none of them. Was it computed "
                "under no_grad, detached, or from another module?"
            )
        self._gradients = gradients
        # A gradient without a graph is constant: that block of H is zero.
        self._curved = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def outdated(self, params: list[Tensor]) -> bool:
        """Whether the parameters were written to since."""
        return [p._version for p in params] != self._versions

    def gradient(self) -> Tensor:
        """Return the gradient, flat."""
        return flatten(self._gradients, self._params, self._dtype, self._device)

    def product(self, parts: list[Tensor], *, keep: bool) -> Tensor:
        """Return the Hessian times ``parts``, flat; ``keep`` the graph for another one."""
        if not self._curved:
            return torch.zeros(sum(p.numel() for p in self._params), dtype=self._dtype, device=self._device)
        products = torch.autograd.grad(
            [g for _, g in self._curved],
            self._aliases,
            grad_outputs=[parts[i].to(g.dtype) for i, g in self._curved],
            retain_graph=keep,
            allow_unused=True,
        )
        return flatten(products, self._params, self._dtype, self._device)


def flatten(tensors: Iterable[Tensor | None], params: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Concatenate tensors shaped like ``params``, zeros for None; dense and detached."""
    flat = [
        torch.zeros(p.numel(), dtype=dtype, device=device)
        if t is None
        else (t.to_dense() if t.is_sparse else t).detach().reshape(-1).to(device, dtype)
        for t, p in zip(tensors, params, strict=True)
    ]
    return torch.cat(flat)
