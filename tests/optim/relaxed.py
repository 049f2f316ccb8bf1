"""A small net, its stream of mini-batches, and closures that draw from it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def stream(seed: int = 0, dtype: torch.dtype = torch.float64) -> Iterator[Batch]:
    """Endless mini-batches, each new."""
    g = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(16, 5, generator=g, dtype=dtype), torch.randint(3, (16,), generator=g)


def make_net(seed: int = 1, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 3, dtype=dtype))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=dtype) / 2)
    return net


class Step:
    """Steps an optimizer; its closure draws the next batch and counts."""

    def __init__(self, net: nn.Module, optimizer: Any, batches: Iterator[Batch], set_to_none: bool = True) -> None:
        self.net = net
        self.optimizer = optimizer
        self.batches = batches
        self.set_to_none = set_to_none
        self.calls = 0
        self.before: Callable[[], Any] = lambda: None  # runs at the start of each evaluation
        self.after: Callable[[], Any] = lambda: None  # runs once the gradients are there

    def closure(self) -> Tensor:
        self.calls += 1
        self.before()
        x, y = next(self.batches)
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        loss = F.cross_entropy(self.net(x), y)
        loss.backward()
        self.after()
        return loss

    def __call__(self, times: int = 1) -> Any:
        for _ in range(times):
            loss = self.optimizer.step(self.closure)
        return loss


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
