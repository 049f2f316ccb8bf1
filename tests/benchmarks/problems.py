"""The nets that are timed, trained by full-batch gradient descent on scikit-learn's digits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """Pre-norm transformer on the eight rows of a digit."""

    def __init__(self, width: int, blocks: int, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x.unflatten(1, (8, 8))) + self.place)).mean(dim=1))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def cnn(channels: int) -> nn.Module:
    c = channels
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, c, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(c, 2 * c, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(2 * c, 4 * c, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * c, 128), nn.GELU(), nn.Linear(128, 10)),
    )


class Problem:
    """A net in training. ``criterion(output, target)`` is a module, which is what the peers take."""

    def __init__(self, net: nn.Module, criterion: nn.Module, samples: int, lr: float, *, one_hot: bool = False) -> None:
        self.net, self.criterion, self.lr = net, criterion, lr
        x, y = digits(samples)
        self.batch: Batch = (x, F.one_hot(y, 10).float() if one_hot else y)
        self.params = list(net.parameters())
        self.optimizer = torch.optim.SGD(self.params, lr=lr)

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params)

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        return self.criterion(net(batch[0]), batch[1])

    def forward_backward(self) -> Callable[[], object]:
        """Return the unit of cost: one forward and backward pass, on a copy, so that it can be timed at any moment."""
        net = copy.deepcopy(self.net)
        params = list(net.parameters())
        return lambda: torch.autograd.grad(self.loss(net, self.batch), params)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss(self.net, self.batch).backward()
            self.optimizer.step()
        self.optimizer.zero_grad()

    def pieces(self, count: int) -> list[Batch]:
        return list(zip(*(tensor.chunk(count) for tensor in self.batch), strict=True))

    def true_sharpness(self) -> float:
        """Largest algebraic eigenvalue of the Hessian: ARPACK on a double-precision copy."""
        net = copy.deepcopy(self.net).double()
        params = list(net.parameters())
        shapes = [p.shape for p in params]
        x, y = (t.double() if t.is_floating_point() else t for t in self.batch)
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(self.loss(net, (x, y)), params, create_graph=True)

        def product(v: np.ndarray) -> np.ndarray:
            pieces = torch.split(torch.from_numpy(np.array(v).reshape(-1)), [s.numel() for s in shapes])
            parts = [piece.view(s) for piece, s in zip(pieces, shapes, strict=True)]
            products = torch.autograd.grad(gradients, params, parts, retain_graph=True)
            return torch.cat([p.reshape(-1) for p in products]).numpy()

        n = self.size
        operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
        v0 = np.random.default_rng(0).standard_normal(n)
        return float(eigsh(operator, k=2, which="LA", tol=1e-3, v0=v0, return_eigenvectors=False).max())


@dataclass(frozen=True)
class Case:
    """A problem and the numbers of steps after which it is measured."""

    name: str
    build: Callable[[], Problem]
    middle: int
    edge: int

    def start(self) -> Problem:
        torch.manual_seed(5)
        return self.build()


CASES = (
    Case("MLP", lambda: Problem(mlp(256), nn.MSELoss(), 1000, 0.8, one_hot=True), 100, 800),
    Case("CNN", lambda: Problem(cnn(12), nn.CrossEntropyLoss(), 256, 0.15), 100, 420),
    Case("transformer", lambda: Problem(Transformer(128, 3), nn.CrossEntropyLoss(), 64, 0.03), 15, 40),
)


def digits(samples: int) -> Batch:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32)
    return ((x - x.mean(0)) / (x.std(0) + 1e-2))[:samples], torch.tensor(labels)[:samples]
