"""Small nets on small data for layer-wise curvature, trained a little, and dense Hessian blocks of their layers.

The blocks are rows of a second backward pass through the whole loss; they share no code with the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Any, Any], Tensor]
STATES = (0, 30, 100, 250)  # steps of gradient descent


def cross_entropy(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def binary(module: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(module(batch[0])[:, 0], batch[1].to(batch[0].dtype))


def reconstruction(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]).flatten(1), batch[0].flatten(1))


@cache
def digits(samples: int, *shape: int) -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    x = (x - x.mean()) / x.std()
    return torch.tensor(x[:samples]).reshape(samples, *shape), torch.tensor(y[:samples])


@cache
def cancer(samples: int) -> tuple[Tensor, Tensor]:
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    order = np.random.RandomState(0).permutation(len(x))[:samples]
    return torch.tensor(x[order]), torch.tensor(y[order])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(30, 12)
        self.norm = nn.BatchNorm1d(12)
        self.c1 = nn.Linear(12, 12)
        self.c2 = nn.Linear(12, 12)
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.inlet(x)))
        return self.head(h + self.c2(F.gelu(self.c1(h))))


class Transformer(nn.Module):
    """One pre-norm block on the eight rows of a digit; a norm behind it, which nothing bypasses, couples its layers."""

    def __init__(self, *, last_norm: bool = False, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(0.1 * torch.randn(8, width))
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm3 = nn.LayerNorm(width) if last_norm else nn.Identity()
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        heads = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
        x = x + self.proj(mixed)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x).mean(1))


class SqueezeExcite(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, 3)
        self.c2 = nn.Conv2d(6, 6, 3, groups=6)
        self.c3 = nn.Conv2d(6, 8, 1)
        self.down = nn.Linear(8, 3)
        self.up = nn.Linear(3, 8)
        self.head = nn.Linear(8, 10)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) if norm else nn.Identity() for n in (6, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip((self.c1, self.c2, self.c3), self.norms, strict=True):
            x = F.silu(norm(layer(x)))
        gate = torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3))))))
        return self.head((x * gate[:, :, None, None]).mean((2, 3)))


class Gated(nn.Module):
    """Two SwiGLU layers, between them a Swish written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(64, 8)
        self.g1 = nn.Linear(8, 10)
        self.v1 = nn.Linear(8, 10)
        self.d1 = nn.Linear(10, 8)
        self.g2 = nn.Linear(8, 10)
        self.v2 = nn.Linear(8, 10)
        self.d2 = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        x = x * torch.sigmoid(x)
        x = x + self.d1(F.silu(self.g1(x)) * self.v1(x))
        return self.d2(F.silu(self.g2(x)) * self.v2(x))


class Repeated(nn.Module):
    """A tanh recurrence over the eight rows: one weight, eight uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(8, 12)
        self.again = nn.Linear(12, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 12)
        for row in x.unbind(1):
            h = torch.tanh(self.inlet(row) + self.again(h))
        return self.head(h)


def convolutions(norm: bool = False, activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 6, 1), (6, 6, 2), (6, 8, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


def _strange_convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=2, padding_mode="circular"), nn.LeakyReLU(0.1),
        nn.Conv2d(6, 6, 3, dilation=2, padding="same", groups=3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 2, padding=1, padding_mode="reflect"), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(72, 10),
    )  # fmt: skip


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Mish(), nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.ELU(),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), nn.Mish(),
        nn.ConvTranspose2d(6, 1, 4, stride=2, padding=1),
    )  # fmt: skip


def _convolutions_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(8, 8, 3, padding=1), nn.Softplus(), nn.Conv1d(8, 8, 3, stride=2), nn.Softplus(),
        nn.Conv1d(8, 8, 2), nn.Softplus(), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def _mixed_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1)
    )


def _tanh_mlp() -> nn.Module:
    widths = (64, 12, 12, 12)
    layers = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(12, 10))


@dataclass(frozen=True)
class Net:
    build: Callable[[], nn.Module]
    loss: Loss
    data: Callable[[], tuple[Tensor, Tensor]]
    lr: float


UNCOUPLED = {
    "residual": Net(Residual, binary, lambda: cancer(128), 0.3),
    "transformer": Net(Transformer, cross_entropy, lambda: digits(96, 8, 8), 0.15),
    "conv1d": Net(_convolutions_1d, cross_entropy, lambda: digits(128, 8, 8), 0.15),
    "strange-convs": Net(_strange_convolutions, cross_entropy, lambda: digits(128, 1, 8, 8), 0.15),
    "autoencoder": Net(_autoencoder, reconstruction, lambda: digits(96, 1, 8, 8), 0.3),
    "silu-convs": Net(convolutions, cross_entropy, lambda: digits(96, 1, 8, 8), 0.15),
    "mixed-mlp": Net(_mixed_mlp, binary, lambda: cancer(128), 0.2),
    "tanh-mlp": Net(_tanh_mlp, cross_entropy, lambda: digits(128, 64), 0.2),
}
COUPLED = {
    "bn-relu-convs": Net(lambda: convolutions(True, nn.ReLU), cross_entropy, lambda: digits(96, 1, 8, 8), 0.15),
    "bn-silu-convs": Net(lambda: convolutions(True), cross_entropy, lambda: digits(96, 1, 8, 8), 0.15),
    "last-norm": Net(lambda: Transformer(last_norm=True), cross_entropy, lambda: digits(96, 8, 8), 0.15),
    "squeeze-excite": Net(SqueezeExcite, cross_entropy, lambda: digits(96, 1, 8, 8), 1.0),
    "gated": Net(Gated, cross_entropy, lambda: digits(128, 64), 0.15),
    "recurrent": Net(Repeated, cross_entropy, lambda: digits(96, 8, 8), 0.15),
}
NETS = UNCOUPLED | COUPLED


def make(name: str, seed: int = 0) -> nn.Module:
    """Build a net in double precision, leaving the global generator and default type alone."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            return NETS[name].build()
        finally:
            torch.set_default_dtype(before)


def train(
    name: str, net: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None, lr: float | None = None
) -> None:
    spec = NETS[name]
    batch = spec.data()
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=spec.lr if lr is None else lr)
    for _ in range(steps):
        optimizer.zero_grad()
        spec.loss(net, batch).backward()
        optimizer.step()
    optimizer.zero_grad()


def states(name: str, seed: int = 0) -> Iterator[tuple[int, nn.Module]]:
    """Yield copies of one net along its training by full-batch gradient descent."""
    net = make(name, seed)
    done = 0
    for step in STATES:
        train(name, net, step - done)
        done = step
        yield step, copy.deepcopy(net)


def layer_weights(net: nn.Module) -> dict[str, Tensor]:
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {name: m.weight for name, m in net.named_modules() if isinstance(m, kinds)}


def dense_block(net: nn.Module, loss: Loss, batch: Any, weight: Tensor) -> Tensor:
    """Hessian of the loss in one weight, ``(n, n)``: rows of a second backward pass, many at a time."""
    net = copy.deepcopy(net)  # batch statistics move
    named = {name: p.detach() for name, p in net.named_parameters()}
    key = next(name for name, p in net.named_parameters() if torch.equal(p, weight) and p.shape == weight.shape)
    leaf = weight.detach().clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
        value = loss(lambda *args: functional_call(net, named | {key: leaf}, args), batch)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    if not gradient.requires_grad:
        return leaf.new_zeros(leaf.numel(), leaf.numel())
    rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0].reshape(-1) for entry in gradient.reshape(-1)]
    return torch.stack(rows)


def top_eigenvalue(block: Tensor) -> float:
    return float(torch.linalg.eigvalsh((block + block.mT) / 2)[-1])
