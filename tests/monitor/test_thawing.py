"""Layers that are thawed during a run: their products are checked too, and a resume knows them."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from eos_monitor import StabilityProbe
from tests.curvature.test_hessian import OnceTanh


class Net(nn.Module):
    """What is frozen at first goes through a function that cannot be differentiated twice, as if by mistake."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 12).requires_grad_(False)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(OnceTanh.apply(self.body(x)))


def loss_fn(net: Any, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 4, generator=generator), torch.randint(0, 3, (48,), generator=generator)


def run(probe: StabilityProbe, net: Net, optimizer: SGD, steps: int) -> None:
    for _ in range(steps):
        probe.step(data())
        optimizer.zero_grad()
        loss_fn(net, data()).backward()
        optimizer.step()


def thaw(net: Net, optimizer: SGD) -> None:
    net.body.requires_grad_(True)
    optimizer.add_param_group({"params": list(net.body.parameters())})


def probe_of(net: Net, optimizer: SGD) -> StabilityProbe:
    return StabilityProbe(net, optimizer, loss_fn, every_n_steps=1, probe=[data()])


def test_thawed_layers_are_checked() -> None:
    net = Net()
    optimizer = SGD(net.head.parameters(), lr=0.1)
    probe = probe_of(net, optimizer)
    run(probe, net, optimizer, 3)
    assert all(reading.edge_ratio is not None for reading in probe.readings)
    thaw(net, optimizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(probe, net, optimizer, 2)
    assert probe.readings[3].edge_ratio is None
    assert any("cannot be differentiated twice" in str(warning.message) for warning in told)


def test_a_run_is_resumed_with_the_layers_that_were_thawed_when_it_was_saved() -> None:
    net = Net()
    optimizer = SGD(net.head.parameters(), lr=0.1)
    probe = probe_of(net, optimizer)
    run(probe, net, optimizer, 1)
    thaw(net, optimizer)
    state = probe.state_dict()
    assert state["watched"] == [["SGD", sum(p.numel() for p in net.parameters())]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "trained [['SGD', 39]], this one 99; its verdict starts afresh"
        probe_of(net, optimizer).load_state_dict(state)
