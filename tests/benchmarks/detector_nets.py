"""Small nets on small data, as functions of one flat vector, so that many runs can be trained at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor
from torch.nn import functional as F

Forward = Callable[[Sequence[Tensor], Tensor], Tensor]
Data = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # samples -> x, y (class numbers or values)


@dataclass(frozen=True)
class Net:
    name: str
    shapes: tuple[tuple[int, ...], ...]
    forward: Forward
    data: Data
    classes: int  # 0 for regression
    squared: bool  # squared error in place of cross-entropy

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def loss(self, flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of one run's weights on one batch."""
        pieces = torch.split(flat, [math.prod(shape) for shape in self.shapes])
        out = self.forward([piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)], x)
        if not self.squared:
            # Without smoothing the classes separate, all curvature vanishes, and nothing stays at the edge.
            return F.cross_entropy(out, y, label_smoothing=0.1)
        # Not F.one_hot, which vmap cannot take apart.
        target = (y[..., None] == torch.arange(self.classes)).to(out.dtype) if self.classes else y
        return 0.5 * (out - target).square().sum(dim=-1).mean()

    def init(self, generator: torch.Generator) -> Tensor:
        """Uniform in ±1/√fan-in, as torch's layers have it."""
        pieces = []
        fan_in = 1
        for shape in self.shapes:
            fan_in = shape[0] if len(shape) == 2 else fan_in
            pieces.append((2 * torch.rand(math.prod(shape), generator=generator) - 1) / math.sqrt(fan_in))
        return torch.cat(pieces)


def _layers(*widths: int) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for a, b in zip(widths, widths[1:], strict=False) for shape in ((a, b), (b,)))


def _mlp(activation: Callable[[Tensor], Tensor]) -> Forward:
    def forward(weights: Sequence[Tensor], x: Tensor) -> Tensor:
        for i in range(0, len(weights) - 2, 2):
            x = activation(x @ weights[i] + weights[i + 1])
        return x @ weights[-2] + weights[-1]

    return forward


def _patches(side: int) -> Tensor:
    """Positions under a 3 × 3 kernel, ``((side − 2)², 9)``."""
    corner = torch.arange(side - 2)
    offsets = (torch.arange(3)[:, None] * side + torch.arange(3)).flatten()
    return (corner[:, None] * side + corner).flatten()[:, None] + offsets


_FROM_8, _FROM_6 = _patches(8), _patches(6)


def _cnn(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Two 3 × 3 convolutions, as products with gathered patches (grouped convolutions are slow on a CPU)."""
    kernel1, bias1, kernel2, bias2, weight, bias = weights
    hidden = F.silu(x[:, _FROM_8] @ kernel1 + bias1)  # (N, 36, 8)
    hidden = hidden[:, _FROM_6].flatten(2)  # (N, 16, 9 · 8)
    return F.silu(hidden @ kernel2 + bias2).flatten(1) @ weight + bias


def _attention(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """One block over the eight rows of a digit."""
    embed, _, position, query, key, value, out, up, up_bias, down, down_bias, head, head_bias = weights
    tokens = x.view(-1, 8, 8) @ embed + position
    scores = (tokens @ query) @ (tokens @ key).transpose(1, 2) / 4.0
    tokens = tokens + torch.softmax(scores, dim=-1) @ (tokens @ value) @ out
    tokens = tokens + F.gelu(tokens @ up + up_bias) @ down + down_bias
    return tokens.mean(dim=1) @ head + head_bias


_ATTENTION_SHAPES = (
    (8, 16), (16,), (8, 16), (16, 16), (16, 16), (16, 16), (16, 16), (16, 32), (32,), (32, 16), (16,), (16, 10), (10,),
)  # fmt: skip


def _table(load: Callable[..., tuple[object, object]]) -> Data:
    x, y = (torch.as_tensor(part) for part in load(return_X_y=True))
    x = ((x - x.mean(0)) / (x.std(0) + 1e-9)).float()

    def draw(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # With replacement where the table is shorter than what is asked for.
        pick = (
            torch.randperm(len(x), generator=generator)[:samples]
            if samples <= len(x)
            else torch.randint(len(x), (samples,), generator=generator)
        )
        return x[pick], y[pick]

    return draw


def _signs(data: Data) -> Data:
    """Two classes as the values ±1."""

    def draw(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = data(samples, generator)
        return x, (2.0 * y - 1.0).float()[:, None]

    return draw


def _teacher(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 8, generator=generator)
    w = torch.randn(8, 3, generator=generator)
    return x, torch.sin(x @ w / 2).sum(dim=1, keepdim=True)


_DIGITS = _table(load_digits)
NETS: dict[str, Net] = {
    net.name: net
    for net in (
        Net("tanh MLP, sines, squared", _layers(8, 32, 32, 1), _mlp(torch.tanh), _teacher, 0, True),
        Net("ReLU MLP, digits, squared", _layers(64, 32, 10), _mlp(torch.relu), _DIGITS, 10, True),
        Net("SiLU CNN, digits", ((9, 8), (8,), (72, 12), (12,), (192, 10), (10,)), _cnn, _DIGITS, 10, False),
        Net("attention, digits", _ATTENTION_SHAPES, _attention, _DIGITS, 10, False),
        Net("SiLU MLP, wine, squared", _layers(13, 32, 32, 3), _mlp(F.silu), _table(load_wine), 3, True),
        Net(
            "GELU MLP, tumours, squared",
            _layers(30, 48, 48, 1),
            _mlp(F.gelu),
            _signs(_table(load_breast_cancer)),
            0,
            True,
        ),
        Net("wide tanh MLP, digits, squared", _layers(64, 128, 128, 10), _mlp(torch.tanh), _DIGITS, 10, True),
        Net("widest tanh MLP, digits", _layers(64, 960, 960, 10), _mlp(torch.tanh), _DIGITS, 10, False),
    )
}
SMALL = tuple(list(NETS)[:6])
