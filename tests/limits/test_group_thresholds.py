"""One threshold for groups that differ by their decay only, as those of everybody's AdamW do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eos_monitor import measure_stability
from eos_monitor.readings.gauge import Gauge


def quadratic(h: Tensor) -> nn.Module:
    net = nn.Module()
    net.one = nn.Parameter(torch.ones(2, dtype=torch.float64))
    net.two = nn.Parameter(torch.ones(2, dtype=torch.float64))
    net.register_buffer("h", h)
    return net


def loss_fn(net: nn.Module, _: Tensor) -> Tensor:
    theta = torch.cat([net.one, net.two])
    return 0.5 * theta @ net.h @ theta


def trained(net: nn.Module, decay: float) -> torch.optim.Optimizer:
    adamw = torch.optim.AdamW(
        [{"params": [net.one], "weight_decay": decay}, {"params": [net.two], "weight_decay": 0.0}],
        lr=0.1,
    )
    for _ in range(60):
        adamw.zero_grad()
        loss_fn(net, torch.zeros(1)).backward()
        adamw.step()
    return adamw


def by_hand(net: nn.Module, adamw: torch.optim.Optimizer) -> tuple[float, float]:
    """Edge ratio and threshold from AdamW's own numbers, groups weighted by the mode.

    A group's threshold is (2 − lr·wd) (1 + β₁) / (1 − β₁), the momentum's bias corrected.
    """
    c = []
    limits = []
    for group in adamw.param_groups:
        (p,) = group["params"]
        state = adamw.state[p]
        step = float(state["step"]) + 1
        beta1, beta2 = group["betas"]
        scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
        limit = (2 - group["lr"] * group["weight_decay"]) * (1 + beta1) / (1 - beta1) * (1 - beta1**step)
        c.append(limit * scale / group["lr"])
        limits += [limit] * len(p)
    root = torch.cat(c).rsqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * net.h * root)
    return float(values[-1]), float((vectors[:, -1].square() * torch.tensor(limits, dtype=torch.float64)).sum())


H = torch.tensor([[3.0, 1.0, 0.5, 0.2], [1.0, 2.0, 0.3, 0.7], [0.5, 0.3, 2.5, 1.0], [0.2, 0.7, 1.0, 1.5]]).double()


def test_groups_with_decay_and_without_have_one_threshold() -> None:
    net = quadratic(H)
    adamw = trained(net, decay=0.1)
    reading = measure_stability(net, loss_fn, [torch.zeros(1)], adamw, full_batch=True)
    ratio, threshold = by_hand(net, adamw)
    assert reading.edge_ratio == pytest.approx(ratio, rel=1e-4)
    assert reading.threshold == pytest.approx(threshold, rel=1e-6)
    assert 37.75 < threshold < 37.94  # between those of the groups, which are told
    assert reading.normalized_sharpness == pytest.approx(ratio * threshold, rel=1e-4)
    assert any("thresholds of the groups from 37.7488 to 37.9385:" in note for note in reading.notes)


@pytest.mark.parametrize(("decay", "alike"), [(0.19, True), (0.21, False)])
def test_thresholds_a_percent_apart_are_one_number_and_no_further(decay: float, alike: bool) -> None:
    net = quadratic(H)
    reading = measure_stability(net, loss_fn, [torch.zeros(1)], trained(net, decay), full_batch=True)
    assert reading.edge_ratio is not None
    assert (reading.threshold is not None) is alike
    assert (reading.normalized_sharpness is not None) is alike


def test_a_carried_reading_keeps_it() -> None:
    net = quadratic(H)
    adamw = trained(net, decay=0.1)
    measurement = Gauge().measure(net, loss_fn, [torch.zeros(1)], [adamw], step=0, full_batch=True)
    for group in adamw.param_groups:
        group["lr"] *= 0.5
    carried = measurement.at([adamw])
    ratio, threshold = by_hand(net, adamw)
    assert carried.edge_ratio == pytest.approx(ratio, rel=0.01)
    assert carried.threshold == pytest.approx(threshold, rel=1e-4)
    assert carried.normalized_sharpness == pytest.approx(ratio * threshold, rel=0.01)
