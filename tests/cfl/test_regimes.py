"""Shares of regimes against counts by plain forward hooks on a copy of the net."""

import copy
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eos_monitor.cfl.regimes import ActivationRegimes
from tests.cfl import regimes_run
from tests.launching import LIMIT, started


def mean_output(module: Any, x: Any) -> Tensor:
    return module(x).square().mean()


def shares(regimes: ActivationRegimes) -> dict[str, tuple[float, ...]]:
    return {layer: tuple(float(share) for share in found) for layer, found in regimes.compute().items()}


def counted(transitioning: Tensor, activated: Tensor) -> tuple[float, float, float]:
    """Shares from two masks, in the order activated, transitioning, not activated."""
    n = transitioning.numel()
    t = int(transitioning.sum())
    a = int((activated & ~transitioning).sum())
    return (a / n, t / n, (n - t - a) / n)


def hooked(module: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Outputs of sub-modules of a copy of the net, cloned before anything can write over them."""
    twin = copy.deepcopy(module)
    seen = {}
    for name in names:
        twin.get_submodule(name).register_forward_hook(
            lambda m, inputs, out, name=name: seen.update({name: out.detach().clone()})
        )
    twin(x)
    return seen


# Solutions of |r″| = ½ max |r″|, by the table of the reference: SiLU, GELU, tanh (two), softplus = 2 arccosh √2.
SILU = 1.1706859
GELU = 0.7936284
TANH_IN = 0.2032656
TANH_OUT = 1.3963123
SOFTPLUS = 1.7627472
# What a brute-force count says of z: (transitioning, activated)
COUNTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "silu": lambda z: (z.abs() < SILU, z > 0),
    "silu-1.5": lambda z: ((1.5 * z).abs() < SILU, z > 0),
    "gelu": lambda z: (z.abs() < GELU, z > 0),
    "tanh": lambda z: ((z.abs() > TANH_IN) & (z.abs() < TANH_OUT), z.abs() < TANH_IN),
    "softplus-2": lambda z: ((2 * z).abs() < SOFTPLUS, z > 0),
    "relu": lambda z: (z.abs() <= 0.1, z > 0),
    "relu6": lambda z: ((z.abs() <= 0.1) | ((z - 6).abs() <= 0.1), (z > 0) & (z < 6)),
    "elu": lambda z: ((z > -0.6931472) & (z < 0), z >= 0),
}
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "F.silu": (F.silu, "silu"),
    "nn.SiLU-in-place": (nn.SiLU(inplace=True), "silu"),
    "by-hand": (lambda z: z * torch.sigmoid(1.5 * z), "silu-1.5"),
    "nn.GELU": (nn.GELU(), "gelu"),
    "torch.tanh": (torch.tanh, "tanh"),
    "tanh_": (lambda z: z.tanh_(), "tanh"),
    "nn.Softplus": (nn.Softplus(2.0), "softplus-2"),
    "F.relu": (F.relu, "relu"),
    "relu_": (lambda z: z.relu_(), "relu"),
    "nn.ReLU-in-place": (nn.ReLU(inplace=True), "relu"),
    "nn.ReLU6": (nn.ReLU6(), "relu6"),
    "nn.ELU": (nn.ELU(), "elu"),
}


class Convolutions(nn.Module):
    """A convolution, a transposed one and a linear layer, each with the same activation."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.up = nn.ConvTranspose2d(4, 2, 3)
        self.fc = nn.Linear(50, 9)
        self.head = nn.Linear(9, 2)
        self.activation = [activation]

    def forward(self, x: Tensor) -> Tensor:
        (r,) = self.activation
        return self.head(r(self.fc(r(self.up(r(self.conv(x)))).flatten(1))))


@pytest.mark.parametrize("form", FORMS)
def test_shares_equal_a_brute_force_count(form: str) -> None:
    activation, kind = FORMS[form]
    torch.manual_seed(0)
    net = Convolutions(activation)
    batches = [3.0 * torch.randn(n, 1, 7, 7) for n in (5, 3)]
    regimes = ActivationRegimes(net)
    for batch in batches:
        regimes.update(mean_output, batch)
    names = ["conv", "up", "fc"]
    parts = [hooked(net, batch, names) for batch in batches]
    wanted = {}
    for name in names:
        z = torch.cat([part[name].flatten() for part in parts])
        assert z.numel() == 8 * {"conv": 4 * 9, "up": 2 * 25, "fc": 9}[name]
        wanted[name] = counted(*COUNTS[kind](z))
    assert shares(regimes) == wanted
    assert regimes.not_attributed == {"head": "no elementwise activation follows (but square)"}
    assert all(sum(found) == pytest.approx(1.0, abs=1e-15) for found in wanted.values())


class Normed(nn.Module):
    """Batch statistics, a residual sum and dropout in front of ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.b = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.a(x)), inplace=True)
        return self.head(F.dropout(self.b(h) + x, 0.25, self.training).relu_())


def test_kinks_use_the_reach_of_the_last_update() -> None:
    """Pre-activations before and after the update by hand: normalized, summed, and with one dropout mask."""
    torch.manual_seed(0)
    net = Normed().double()
    x = torch.randn(40, 6, dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    mean_loss = net(x).square().mean()
    mean_loss.backward()
    optimizer.step()
    regimes = ActivationRegimes(net)
    regimes.update(mean_output, x, before)

    def normalized(y: Tensor) -> Tensor:
        scale = (y.var(0, unbiased=False) + net.norm.eps).sqrt()
        return (y - y.mean(0)) / scale * net.norm.weight + net.norm.bias

    with torch.no_grad():
        first = [
            normalized(x @ w.T + b) for w, b in ((net.a.weight, net.a.bias), (before["a.weight"], before["a.bias"]))
        ]
        h = first[0].relu()
        sums = [h @ w.T + b + x for w, b in ((net.b.weight, net.b.bias), (before["b.weight"], before["b.bias"]))]
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the sandbox's seed
            mask = F.dropout(torch.ones_like(x), 0.25)
    second = [mask * s for s in sums]
    wanted = {}
    for name, (now, old) in {"a": first, "b": second}.items():
        wanted[name] = counted(now.abs() <= (now - old).abs(), now > 0)
    assert shares(regimes) == wanted
    assert regimes.activations == {"a": "relu via batch_norm", "b": "relu via add, dropout"}
    assert 0.02 < wanted["a"][1] < 0.9  # a reach that tells entries apart
    fixed = ActivationRegimes(net, kink_width=0.3)
    fixed.update(mean_output, x)
    assert shares(fixed)["a"] == counted(first[0].abs() <= 0.3, first[0] > 0)


def test_update_of_nothing_has_no_reach() -> None:
    net = Normed().eval()
    x = torch.randn(30, 6)
    regimes = ActivationRegimes(net)
    regimes.update(mean_output, x, net.state_dict())
    assert all(found[1] == 0.0 for found in shares(regimes).values())


def test_layer_used_twice_counts_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(F.silu(self.layer(x))))

    net = Twice()
    x = 2.0 * torch.randn(20, 5)
    regimes = ActivationRegimes(net)
    regimes.update(mean_output, x)
    with torch.no_grad():
        one = net.layer(x)
        two = net.layer(F.silu(one))
    parts = [torch.cat(masks) for masks in zip(COUNTS["silu"](one), COUNTS["tanh"](two), strict=True)]
    assert shares(regimes) == {"layer": counted(*parts)}
    assert regimes.activations == {"layer": "silu; tanh"}


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.idle = nn.Linear(4, 4)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.plain = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.normed(self.attend(x, x, x)[0]))
        return F.gelu(self.plain(F.relu(self.frozen(h))))


@pytest.mark.parametrize("train", [True, False])
def test_what_cannot_be_attributed_says_why(train: bool) -> None:
    net = Odd().train(train)
    regimes = ActivationRegimes(net)
    assert set(regimes.not_attributed.values()) == {"not measured yet"}
    regimes.update(mean_output, torch.randn(3, 5, 4))
    assert set(shares(regimes)) == {"plain"}
    reasons = regimes.not_attributed
    assert reasons["attend.in_proj_weight"].startswith("inside nn.MultiheadAttention")
    assert reasons["attend.out_proj"].startswith("inside nn.MultiheadAttention")
    assert reasons["idle"] == "not used in this batch"
    assert reasons["frozen"].startswith("frozen")
    assert reasons["normed"].startswith("its weight goes into")
    regimes.reset()
    assert set(regimes.not_attributed.values()) == {"not measured yet"}


def test_mixed_types_count_alike() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Linear(4, 8).bfloat16()
            self.high = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.high(F.silu(self.low(x.bfloat16()).float())))

    net = Mixed()
    x = 3.0 * torch.randn(30, 4)
    regimes = ActivationRegimes(net)
    regimes.update(mean_output, x)
    seen = hooked(net, x, ["low", "high"])
    assert shares(regimes) == {
        "low": counted(*COUNTS["silu"](seen["low"].float())),
        "high": counted(*COUNTS["tanh"](seen["high"])),
    }


def test_entries_that_are_not_numbers_are_in_no_regime() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.SiLU())
    nn.init.ones_(net[0].weight)
    regimes = ActivationRegimes(net)
    regimes.update(mean_output, torch.tensor([[float("nan")], [5.0], [float("inf")], [float("-inf")]]))
    assert shares(regimes) == {"0": (2 / 3, 0.0, 1 / 3)}


def test_nothing_of_the_module_changes() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 2))
    x = torch.randn(8, 6)
    net(x).sum().backward()
    regimes = ActivationRegimes(net)

    def run(module: Any, batch: Tensor) -> Tensor:
        for layer in list(module)[:5]:
            batch = layer(batch)
        return batch.sum()

    def everything() -> list[Any]:
        tensors = [*net.parameters(), *(p.grad for p in net.parameters()), *net.buffers(), x]
        attributes = [{key: id(value) for key, value in m.__dict__.items()} for m in net.modules() if m is not regimes]
        generators = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
        entries = [{key: id(value) for key, value in m._parameters.items()} for m in net.modules()]
        versions = [t._version for t in tensors]
        return [[t.tolist() for t in tensors], versions, attributes, entries, generators, torch.is_grad_enabled()]

    net.regimes = regimes  # as an attribute of what it measures
    before = everything()
    regimes.update(run, x, net.state_dict())
    assert everything() == before
    assert int(regimes.counts.sum()) == 8 * 6


def test_metric_follows_torchmetrics() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    regimes = ActivationRegimes(net)
    assert list(regimes.parameters()) == []
    assert list(regimes.children()) == []
    regimes.update(mean_output, torch.randn(7, 4))
    clone = regimes.clone()
    assert shares(clone) == shares(regimes)
    nn.init.zeros_(net[0].weight)  # the copy measures the same module, not a copy of it
    nn.init.zeros_(net[0].bias)
    clone.reset()
    clone.update(mean_output, torch.randn(7, 4))
    assert shares(clone) == {"0": (1.0, 0.0, 0.0)}
    assert pickle.loads(pickle.dumps(regimes)).counts.tolist() == regimes.counts.tolist()

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.head = nn.Linear(2, 1)
            self.regimes = ActivationRegimes(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.layer(x)))

    owner = copy.deepcopy(Owner())
    nn.init.zeros_(owner.layer.weight)
    nn.init.constant_(owner.layer.bias, 3.0)
    owner.regimes.update(mean_output, torch.randn(3, 2))
    assert shares(owner.regimes) == {"layer": (0.0, 0.0, 1.0)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationRegimes(nn.BatchNorm1d(3)), "Expected a module with a Linear or convolution layer, got"),
        (lambda: ActivationRegimes(nn.Linear(2, 2), kink_width=-1.0), "Expected `kink_width` >= 0, got -1.0"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_updates_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    regimes = ActivationRegimes(net)
    with pytest.raises(ValueError, match="Expected a batch with at least one sample, got none: layer '0'"):
        regimes.update(mean_output, torch.zeros(0, 2))
    with pytest.raises(ValueError, match="Expected `previous` to name parameters of the module, got"):
        regimes.update(mean_output, torch.zeros(1, 2), {"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"Expected '0.weight' of shape \(2, 2\), got \(3, 2\)"):
        regimes.update(mean_output, torch.zeros(1, 2), {"0.weight": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="Expected a loss that runs through a Linear or convolution layer"):
        regimes.update(lambda m, x: x.sum(), torch.zeros(1, 2))
    assert int(regimes.counts.sum()) == 0


def test_two_processes_give_what_one_gives_on_the_union(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", regimes_run.__file__]
    with started(*command, 0, tmp_path) as (one, said), started(*command, 1, tmp_path) as (other, _):
        assert [process.wait(LIMIT) for process in (one, other)] == [0, 0], said()
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    union = ActivationRegimes(regimes_run.net())
    for rank in (0, 1):
        for batch in regimes_run.batches(rank):
            union.update(regimes_run.loss, batch)
    wanted = {layer: torch.stack(list(found)) for layer, found in union.compute().items()}
    assert set(wanted) == {"conv", "hidden", "rare"}
    for result in (first, second):
        assert set(result["shares"]) == set(wanted)
        assert all(torch.equal(result["shares"][layer], wanted[layer]) for layer in wanted)
    # Batches of different sizes on the two: a mean of shares would be another number.
    assert first["reasons"].keys() - second["reasons"].keys() == {"rare"}


def input_gradient(module: Any, x: Any) -> Tensor:
    points = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(module(points).sum(), points, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def gradient_penalty(module: Any, x: Any) -> Tensor:
    loss = mean_output(module, x)
    slopes = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    return loss + sum((slope.square().sum() for slope in slopes), torch.zeros(()))


def without_a_graph(module: Any, x: Any) -> Tensor:
    with torch.no_grad():
        features = module[:2](x)
    return module[2:](features).square().mean()


@pytest.mark.parametrize("loss_fn", [input_gradient, gradient_penalty, without_a_graph])
def test_losses_may_differentiate_within_or_leave_the_graph(loss_fn: Callable[[Any, Any], Tensor]) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(8, 2)
    plain = ActivationRegimes(net)
    plain.update(mean_output, x)
    regimes = ActivationRegimes(net)
    regimes.update(loss_fn, x)
    assert shares(regimes) == shares(plain)
    assert set(shares(regimes)) == {"0", "2"}
    assert all(p.grad is None for p in net.parameters())
