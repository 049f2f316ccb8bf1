"""Running statistics at the weights in place."""

import copy

import pytest
import torch
from torch import nn

from eos_monitor.optim import HamiltonJacobi, recompute_batch_norm
from tests.optim.relaxed import Step, make_net, stream


def normalized() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2))


def test_statistics_are_those_over_the_batches() -> None:
    net = normalized()
    net[2].eval()
    batches = [(torch.randn(16, 5), None) for _ in range(3)]
    modes = [m.training for m in net.modules()]
    rng = torch.get_rng_state()
    recompute_batch_norm(net, iter(batches))
    hidden = [net[0](x).detach() for x, _ in batches]
    # float32 sums of 16 values
    torch.testing.assert_close(net[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    scaled = [(h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt() for h in hidden]  # without dropout
    out = [net[3](s).detach() for s in scaled]
    torch.testing.assert_close(net[4].running_mean, torch.stack([o.mean(0) for o in out]).mean(0))
    assert [m.training for m in net.modules()] == modes
    assert [m.momentum for m in net if isinstance(m, nn.BatchNorm1d)] == [0.1, 0.1]
    assert torch.equal(torch.get_rng_state(), rng)


def test_statistics_after_a_step_are_those_of_x() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64))
    batch = next(stream())
    step = Step(net, HamiltonJacobi(net.parameters(), lr=0.5, gamma=2.0), iter([batch] * 5))
    step()
    expected = net[0](batch[0]).mean(0).detach()
    drift = float((net[1].running_mean - expected).abs().max())
    recompute_batch_norm(net, [batch])
    assert drift > 1e-3
    torch.testing.assert_close(net[1].running_mean, expected)


def test_no_batches_leave_the_statistics() -> None:
    net = normalized()
    net(torch.randn(16, 5))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="Expected at least one batch"):
        recompute_batch_norm(net, [])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_own_forward_and_no_layers() -> None:
    net = normalized()
    recompute_batch_norm(net, [{"x": torch.randn(8, 5)}], lambda module, batch: module(batch["x"]))
    assert int(net[1].num_batches_tracked) == 1
    recompute_batch_norm(make_net(), [])
