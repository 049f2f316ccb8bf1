r"""GN's factors: probes v of the loss's curvature at the output, mean v vᵀ ≈ H_out, and what they are at the layers.

The curvature of the loss in the net's output is a block for each sample (or each row of it). Signs in the eigenbasis
of the blocks have the least noise of all probes that were compared; the empirical Fisher is none (late in training it
is off by an order of magnitude). Nothing is read from the loss's arguments: its Hessian is recognised by its products,
so that class weights, ignored rows, label smoothing and reductions need no case of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from eos_monitor.cfl.calls import LayerCall

_LARGEST_BLOCK = 64  # blocks above are not diagonalised
_ROUNDINGS = 100
_Product = Callable[[Tensor], Tensor]


class NotSeparableError(RuntimeError):
    """The loss couples its rows, so that GN is no sum over samples."""


def output_probes(
    loss: Tensor, edge: GradientEdge, out: Tensor, probes: int, generator: torch.Generator
) -> list[Tensor]:
    r"""Return ``probes`` random vectors of the output's shape with :math:`E[v v^\top] = H`, H clipped to its PSD part.

    .. math:: v = U \Lambda^{1/2} e, \quad H = U \Lambda U^\top = \nabla^2_{out} loss, \quad e_i = \pm 1,

    H including the reduction factor of the loss. Where the number of probes is a power of two, their signs are the rows
    of a Hadamard matrix in a random basis of signs: exact with as many probes as a sample has eigenvalues, and from
    the first on where there is only one (one output, or two classes).

    Args:
        loss: Scalar loss.
        edge: Where the output is in the loss's graph, which is kept.
        out: Values there (up to a constant in each row), of rows or samples that do not interact.
        probes: Number of probes.
        generator: Source of the signs, on the CPU.

    Raises:
        NotSeparableError: If the rows interact, as in a contrastive loss, or their blocks are too large to tell.
    """
    (gradient,) = torch.autograd.grad(loss, edge, create_graph=True)

    def product(u: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(out)
        (h,) = torch.autograd.grad(gradient, edge, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(out) if h is None else h.detach()

    def signs() -> Tensor:
        return (2 * torch.randint(0, 2, out.shape, generator=generator, device="cpu") - 1).to(out.device, out.dtype)

    root = _root(product, out.detach(), signs)
    if probes & (probes - 1):
        return [root(signs()) for _ in range(probes)]
    basis = signs()
    place = torch.arange(out[0].numel(), device=out.device).view(out.shape[1:]) % probes
    return [root(basis * row[place]) for row in _hadamard(probes).to(out)]


def probe_gradients(
    edge: GradientEdge, probes: Sequence[Tensor], calls: Sequence[LayerCall], samples: int
) -> list[Tensor]:
    """Return g = ∂⟨v, out⟩/∂z of each call and probe v, ``(samples, probes, entries of z in one sample)``.

    Args:
        edge: Where the output is in the graph, which is kept.
        probes: Vectors v of the output's shape.
        calls: Calls of layers; behind a batch normalization in train mode, z is what it returns.
        samples: Samples in the batch.
    """
    ends = [call.normalized_edge for call in calls]
    gradients = [call.weight.new_empty(samples, len(probes), call.shape.numel() // samples) for call in calls]
    for r, v in enumerate(probes):
        found = torch.autograd.grad([edge], ends, [v], retain_graph=True, allow_unused=True)
        for at_call, g in zip(gradients, found, strict=True):
            at_call[:, r] = 0.0 if g is None else g.reshape(samples, -1)
    return gradients


def _hadamard(size: int) -> Tensor:
    rows = torch.ones(1, 1, device="cpu")
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows


def _root(product: _Product, out: Tensor, signs: Callable[[], Tensor]) -> _Product:
    """Return the map e -> H^½ e, up to a rotation, after recognising the form of H."""
    # Not signs alone: against these, H u must tell the structures apart.
    u = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape) * signs()
    hu = product(u)
    e = signs()
    diagonal = e * product(e)
    if _agree(diagonal * u, hu):
        scale = diagonal.clamp(min=0.0).sqrt()
        return lambda e: scale * e
    for axis in dict.fromkeys((out.ndim - 1, min(1, out.ndim - 1))):
        root = _softmax_root(out, axis, u, hu) or _block_root(product, out, axis, u, hu)
        if root is not None:
            return root
    if out.ndim > 2:  # rows of one sample that interact
        flat = _block_root(
            lambda v: product(v.reshape(out.shape)).flatten(1), out.flatten(1), 1, u.flatten(1), hu.flatten(1)
        )
        if flat is not None:
            return lambda e: flat(e.flatten(1)).reshape(out.shape)
    raise NotSeparableError(
        "the loss couples its rows, or its curvature has blocks of more than "
        f"{_LARGEST_BLOCK} outputs that are not those of a softmax"
    )


def _softmax_root(out: Tensor, axis: int, u: Tensor, hu: Tensor) -> _Product | None:
    """Return the root of H = w (diag p − p pᵀ) by rows, whatever the weights w ≥ 0 of the rows; None if H is other."""
    p = torch.softmax(out, axis)
    bare = p * u - p * (p * u).sum(axis, keepdim=True)
    strength = (u * bare).sum(axis, keepdim=True)
    # Where one class has all the probability, what is left of both is rounding.
    rounding = _ROUNDINGS * torch.finfo(out.dtype).eps * (p * u.square()).sum(axis, keepdim=True)
    clear = strength > rounding
    weight = (u * hu).sum(axis, keepdim=True) / strength.clamp(min=torch.finfo(out.dtype).tiny)
    usual = weight[clear].mean() if bool(clear.any()) else strength.new_tensor(out.shape[axis] / out.numel())
    weight = torch.where(clear, weight, usual)
    slack = float(torch.linalg.vector_norm(usual * rounding))
    if not _agree(weight * bare, hu, slack):
        return None
    scale = weight.clamp(min=0.0).sqrt()
    if out.shape[axis] > _LARGEST_BLOCK:
        half = p.sqrt()
        return lambda e: scale * (half * e - p * (half * e).sum(axis, keepdim=True))
    rows = p.movedim(axis, -1)
    root = _eigen_root(torch.diag_embed(rows) - rows[..., :, None] * rows[..., None, :])
    return lambda e: scale * root(e.movedim(axis, -1)).movedim(-1, axis)


def _block_root(product: _Product, out: Tensor, axis: int, u: Tensor, hu: Tensor) -> _Product | None:
    """Return the root of H in blocks along one axis, by one product for each of its entries; None if H is other."""
    size = out.shape[axis]
    if size > _LARGEST_BLOCK:
        return None
    columns = []
    for i in range(size):
        unit = torch.zeros_like(out)
        unit.select(axis, i).fill_(1.0)
        columns.append(product(unit).movedim(axis, -1))
    blocks = torch.stack(columns, dim=-1)
    expected = (blocks @ u.movedim(axis, -1)[..., None])[..., 0].movedim(-1, axis)
    if not _agree(expected, hu):
        return None
    root = _eigen_root((blocks + blocks.mT) / 2)
    return lambda e: root(e.movedim(axis, -1)).movedim(-1, axis)


def _eigen_root(blocks: Tensor) -> _Product:
    """Return the root of blocks: their eigenvectors times the roots of their eigenvalues."""
    values, vectors = torch.linalg.eigh(blocks)
    root = vectors * values.clamp(min=0.0).sqrt()[..., None, :]  # negative ones are not Gauss–Newton's
    return lambda e: (root @ e[..., None])[..., 0]


def _agree(a: Tensor, b: Tensor, slack: float = 0.0) -> bool:
    # Rounding of a few products, far below any structure that is not there.
    limit = torch.finfo(a.dtype).eps ** 0.5 * float(torch.linalg.vector_norm(b)) + slack
    return bool(float(torch.linalg.vector_norm(a - b)) <= limit)
