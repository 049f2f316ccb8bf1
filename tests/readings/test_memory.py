"""A reading that runs out of memory: what it held is gone before the next attempt, and smaller is told."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from eos_monitor import HessianOperator, Probe, StabilityProbe


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """An accelerator's allocator does not run it either."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Limited:
    """A loss that takes so many samples and no more, and knows which of its activations are alive."""

    def __init__(self, most: int, dtype: torch.dtype | None = None) -> None:
        self.most = most
        self.dtype = dtype  # in which it runs out; None for any
        self.held: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def __call__(self, net: Any, batch: Any) -> Tensor:
        self.alive.append(sum(one() is not None for one in self.held))
        y = net(batch[0])
        if len(y) > self.most and self.dtype in (None, y.dtype):
            self.held.append(weakref.ref(y))
            raise torch.OutOfMemoryError("tried to allocate 1 PiB")
        return F.mse_loss(y.squeeze(1), batch[1].to(y.dtype))


def net_of(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Linear(8, 1))


def data(n: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator), torch.randn(n, generator=generator)


def true_ratio(net: nn.Module, lr: float) -> float:
    """lr·λ_max/2 of the dense Hessian."""
    names = [name for name, _ in net.named_parameters()]
    params = tuple(p.detach().double() for p in net.parameters())
    x, y = data()
    sizes = [p.numel() for p in params]

    def value(flat: Tensor) -> Tensor:
        pieces = [piece.view(p.shape) for piece, p in zip(torch.split(flat, sizes), params, strict=True)]
        out = torch.func.functional_call(net, dict(zip(names, pieces, strict=True)), (x.double(),))
        return F.mse_loss(out.squeeze(1), y.double())

    start = torch.cat([p.reshape(-1) for p in params])
    return lr / 2 * float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(value, start))[-1])


def test_a_failed_attempt_is_gone_when_the_halves_are_tried_and_they_are_told() -> None:
    net, loss_fn = net_of(), Limited(32)
    probe = StabilityProbe(
        net, SGD(net.parameters(), lr=0.1), loss_fn, every_n_steps=1, probe=Probe(samples=64, full_batch=True)
    )
    reading = probe.step(data())
    assert reading is not None
    assert loss_fn.alive[0] == 0
    assert loss_fn.alive[1] == 0  # nothing of the first attempt
    assert reading.edge_ratio == pytest.approx(true_ratio(net, 0.1), rel=1e-3)
    assert not reading.full_batch
    assert any("halved" in note for note in reading.notes)


def test_batches_are_not_halved_where_batch_statistics_make_another_loss_of_a_half() -> None:
    net = net_of(norm=True)
    probe = StabilityProbe(
        net, SGD(net.parameters(), lr=0.1), Limited(32), every_n_steps=1, probe=Probe(samples=64, full_batch=True)
    )
    with pytest.warns(UserWarning, match="1 PiB"):
        assert probe.step(data()) is None
    net.eval()  # running statistics couple nothing
    assert probe.step(data()) is not None


def test_a_check_that_runs_out_in_double_precision_is_gone_before_it_falls_back() -> None:
    net, loss_fn = net_of(), Limited(32, torch.float64)
    operator = HessianOperator(net, loss_fn, [data()])
    check = operator.check(torch.ones(operator.size))
    assert (check.passed, check.dtype) == (True, torch.float32)
    assert loss_fn.held
    assert max(loss_fn.alive) == 0
