"""Small nets with their losses and data, and dense Hessians of them that share no code with the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


@dataclass
class Problem:
    """A module, a mean loss, and batches to take it over."""

    module: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batches: list[Any]
    sizes: list[int] = field(default_factory=list)

    def trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def cross_entropy(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def squared_error(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


def mean_loss(problem: Problem, trained: dict[str, Tensor]) -> Tensor:
    """Mean over all samples, batch b under the seed b."""
    sizes = problem.sizes or [len(batch[0]) for batch in problem.batches]
    total = torch.zeros((), dtype=torch.float64)
    for seed, (size, batch) in enumerate(zip(sizes, problem.batches, strict=True)):
        torch.manual_seed(seed)
        loss = problem.loss_fn(lambda *args: functional_call(problem.module, trained, args), batch)
        total = total + size / sum(sizes) * loss
    return total


def dense_hessian(problem: Problem) -> Tensor:
    """Hessian over the trained parameters in ``named_parameters`` order, row by row."""
    trained = problem.trained()
    shapes = [p.shape for p in trained.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = torch.split(flat, [shape.numel() for shape in shapes])
        return mean_loss(problem, {k: p.view(s) for k, p, s in zip(trained, pieces, shapes, strict=True)})

    start = torch.cat([p.detach().reshape(-1) for p in trained.values()])
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, start)


def difference_hessian(problem: Problem, step: float = 1e-5) -> Tensor:
    """Hessian by central differences of first derivatives: no second backward pass at all."""
    trained = list(problem.trained().values())
    columns = []
    for p in trained:
        for i in range(p.numel()):
            gradients = []
            for sign in (1.0, -1.0):
                kept = p.data.view(-1)[i].item()
                p.data.view(-1)[i] = kept + sign * step
                loss = mean_loss(problem, problem.trained())
                parts = torch.autograd.grad(loss, trained, allow_unused=True)
                p.data.view(-1)[i] = kept
                gradients.append(
                    torch.cat(
                        [
                            torch.zeros(q.numel(), dtype=q.dtype) if g is None else g.to_dense().reshape(-1)
                            for g, q in zip(parts, trained, strict=True)
                        ]
                    )
                )
            columns.append((gradients[0] - gradients[1]) / (2 * step))
    return torch.stack(columns, dim=1)


class Tied(nn.Module):
    """One matrix in two layers, so that it has one name and two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.norm, self.out = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.LayerNorm(4),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + self.attend(x, x, x, need_weights=False)[0]).mean(dim=1))


class CausalAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, -1])


class Recurrent(nn.Module):
    def __init__(self, cell: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.out = cell(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


class Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(words)).mean(dim=1))


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.idle = nn.Linear(4, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.inlet, self.body, self.out = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.body, torch.tanh(self.inlet(x)), use_reentrant=self.reentrant))


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def labelled(sizes: Sequence[int], shape: Sequence[int], classes: int = 3) -> list[Any]:
    return [(torch.randn(n, *shape), torch.randint(0, classes, (n,))) for n in sizes]


def _frozen() -> Problem:
    net = mlp(4, 6, 3)
    net[0].requires_grad_(False)
    return Problem(net, cross_entropy, labelled([9], [4]))


def _negative() -> Problem:
    # Minus a squared error: the curvature of the fit turns negative, what is left of positive is small.
    net = mlp(4, 6, 2)
    return Problem(net, lambda m, b: -squared_error(m, b), [(torch.randn(9, 4), torch.randn(9, 2))])


def _cluster() -> Problem:
    # Orthogonal inputs of known squared lengths: H = 2 diag(lengths) in their basis, five of them within 0.4 %.
    lengths = torch.cat([torch.linspace(1.0, 0.996, 5), torch.linspace(0.5, 0.01, 35)])
    x = torch.linalg.qr(torch.randn(40, 40))[0] * lengths.sqrt()[:, None]
    return Problem(nn.Linear(40, 1, bias=False), squared_error, [(40**0.5 * x, torch.randn(40, 1))])


def _dropout() -> Problem:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    return Problem(net, cross_entropy, labelled([6, 9], [4]))


def _named_fields() -> Problem:
    def loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch["x"]), batch["labels"])

    batches = [{"labels": y, "x": x} for x, y in labelled([5, 2], [4])]
    return Problem(mlp(4, 5, 3), loss, batches, sizes=[5, 2])


def _convolution() -> Problem:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.GroupNorm(3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    return Problem(net, cross_entropy, labelled([7], [1, 6, 6]))


def _batch_norm() -> Problem:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    return Problem(net, cross_entropy, labelled([8, 5], [4]))


def _words(*, sparse: bool) -> Problem:
    return Problem(Words(sparse=sparse), cross_entropy, [(torch.randint(0, 7, (8, 3)), torch.randint(0, 3, (8,)))])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "unequal-batches": lambda: Problem(mlp(4, 6, 3), cross_entropy, labelled([3, 5, 17], [4])),
    "dict-batches": _named_fields,
    "tied": lambda: Problem(Tied(), squared_error, [(torch.randn(9, 4), torch.randn(9, 2))]),
    "frozen": _frozen,
    "negative": _negative,
    "cluster": _cluster,
    "relu": lambda: Problem(mlp(4, 8, 3, activation=nn.ReLU), cross_entropy, labelled([16], [4])),
    "convolution": _convolution,
    "multi-head-attention": lambda: Problem(Attention(), cross_entropy, labelled([6], [5, 4])),
    "causal-attention": lambda: Problem(CausalAttention(), cross_entropy, labelled([6, 4], [5, 4])),
    "lstm": lambda: Problem(Recurrent(nn.LSTM), cross_entropy, labelled([6], [5, 3])),
    "gru": lambda: Problem(Recurrent(nn.GRU), cross_entropy, labelled([6], [5, 3])),
    "batch-norm": _batch_norm,
    "dropout": _dropout,
    "embedding": lambda: _words(sparse=False),
    "sparse-embedding": lambda: _words(sparse=True),
    "partly-used": lambda: Problem(PartlyUsed(), cross_entropy, labelled([6], [4])),
    "checkpointed": lambda: Problem(Checkpointed(reentrant=False), cross_entropy, labelled([6], [4])),
}


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Build one of PROBLEMS in ``dtype``, seeded, leaving the global generator and default type alone."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            return PROBLEMS[name]()
        finally:
            torch.set_default_dtype(before)
