"""Twin runs against closed forms, against hand-written loops, and on the recipe that tells learning rates apart."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from eos_monitor.perturbation import TwinRun, relative_l1, twin_run

Build = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.2),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
}


class Quadratic(nn.Module):
    def __init__(self, curvatures: list[float]) -> None:
        super().__init__()
        self.register_buffer("curvatures", torch.tensor(curvatures, dtype=torch.float64))
        self.x = nn.Parameter(torch.linspace(1.0, 2.0, len(curvatures), dtype=torch.float64))

    def forward(self, scale: Tensor) -> Tensor:
        return 0.5 * scale.mean() * (self.curvatures * self.x.square()).sum()


def value(module: Any, batch: Tensor) -> Tensor:
    return module(batch)


def small_net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3)).to(dtype)


def batches_for(dtype: torch.dtype) -> list[Any]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 8, generator=g, dtype=dtype), torch.randint(3, (16,), generator=g)) for _ in range(3)]


def cross_entropy(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("lr", [0.05, 0.195, 0.21, 0.3])
def test_gain_along_the_top_mode_is_the_multiplier_to_the_power(lr: float) -> None:
    """Gradient descent on ½ h x² multiplies a difference by 1 − lr·h; h = 10 is unstable above lr = 0.2."""
    net = Quadratic([10.0, 1.0])
    run = twin_run(
        net,
        value,
        [torch.ones(1, dtype=torch.float64)],
        torch.optim.SGD(net.parameters(), lr=lr),
        steps=24,
        perturbation=torch.tensor([1.0, 0.0]),
    )
    multiplier = abs(1 - 10 * lr)
    # The 1e-9 perturbation is itself known to 7 digits only.
    assert run.gain == pytest.approx([multiplier**t for t in range(24)], rel=1e-5)
    assert run.rate == pytest.approx(math.log(multiplier), rel=1e-5)
    assert run.verdict == ("amplifying" if lr > 0.25 else "attenuating" if lr < 0.15 else "neutral")


def test_relative_l1_is_the_papers() -> None:
    theta = torch.tensor([1.0, -2.0, 0.0, 0.0])
    other = torch.tensor([1.5, 2.0, 3.0, 0.0])
    assert relative_l1(theta, other) == pytest.approx(2 / 4 * (0.5 / 2.5 + 4 / 4 + 3 / 3))


# ---------------------------------------------------------------- the last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_powers_of_two_change_nothing_and_three_does(build: Build, dtype: torch.dtype) -> None:
    net = small_net(dtype)
    for k in (2.0, 4.0, 8.0):
        run = twin_run(net, cross_entropy, batches_for(dtype), build(net.parameters()), steps=40, k=k)
        assert max(run.relative_l1) == 0.0
        assert set(run.gain) == {0.0}
    run = twin_run(net, cross_entropy, batches_for(dtype), build(net.parameters()), steps=40, k=3.0)
    assert 0.0 < run.relative_l1[-1] < 1e-3


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_twins_are_what_a_plain_loop_gives_and_the_run_is_untouched(build: Build) -> None:
    net = small_net(torch.float32)
    net[2].p = 0.0
    optimizer = build(net.parameters())
    data = batches_for(torch.float32)
    for batch in data:  # some state
        optimizer.zero_grad()
        cross_entropy(net, batch).backward()
        optimizer.step()
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    generator = torch.get_rng_state()
    grads = [p.grad for p in net.parameters()]
    run = twin_run(net, cross_entropy, data, optimizer, steps=7, k=3.0)
    after = (net.state_dict(), optimizer.state_dict())
    assert str(before) == str(after)
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))

    ends = []
    for k in (None, 3.0):
        twin = copy.deepcopy(net)
        stepper = build(twin.parameters())
        stepper.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        losses = []
        for t in range(7):
            stepper.zero_grad()
            loss = cross_entropy(twin, data[t % 3])
            losses.append(float(loss.detach()))
            loss.backward()
            if k is not None:
                for p in twin.parameters():
                    p.grad = p.grad * k / k
            stepper.step()
        ends.append((torch.cat([p.detach().reshape(-1) for p in twin.parameters()]), losses))
    assert run.losses == pytest.approx(ends[0][1], rel=1e-6)
    a, b = (end[0].double() for end in ends)
    assert run.relative_l1[-1] == pytest.approx(float(2 * ((a - b).abs() / (a.abs() + b.abs())).mean()), rel=1e-6)


@pytest.mark.parametrize("steps", [16, 32, 64])
def test_last_bits_that_only_add_up_are_not_amplified(steps: int) -> None:
    """At a learning rate far below any limit; the same run is neutral too if it is moved once, at the start."""
    net = small_net(torch.float32)
    data = batches_for(torch.float32)
    added = twin_run(net, cross_entropy, data, torch.optim.SGD(net.parameters(), lr=1e-2), steps=steps, k=3.0)
    assert max(added.gain) > 2.0
    assert added.verdict == "neutral"
    moved = twin_run(
        net, cross_entropy, data, torch.optim.SGD(net.parameters(), lr=1e-2), steps=steps, perturbation="random"
    )
    assert max(moved.gain) < 1.1


def test_scheduled_settings_are_used() -> None:
    net = Quadratic([10.0])
    settings = [[[{"lr": 0.05}]]] * 3 + [[[{"lr": 0.3}]]] * 3
    run = twin_run(
        net,
        value,
        [torch.ones(1, dtype=torch.float64)],
        torch.optim.SGD(net.parameters(), lr=0.1),
        steps=6,
        perturbation="random",
        settings=settings,
    )
    assert run.gain == pytest.approx([1, 0.5, 0.25, 0.5, 1.0, 2.0], rel=1e-5)


# ---------------------------------------------------------------- not instability


def test_a_net_that_ignores_its_inputs_is_dead_and_not_stable() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        net[0].bias.fill_(-1e3)
    run = twin_run(net, cross_entropy, batches_for(torch.float32), torch.optim.SGD(net.parameters(), lr=0.1))
    assert run.verdict == "dead"
    alive = small_net(torch.float32)
    run = twin_run(alive, cross_entropy, batches_for(torch.float32), torch.optim.SGD(alive.parameters(), lr=0.01))
    assert run.verdict == "neutral"


def test_no_gradient_at_all_is_dead() -> None:
    net = Quadratic([0.0])
    run = twin_run(net, value, [torch.ones(1, dtype=torch.float64)], torch.optim.SGD(net.parameters(), lr=0.1))
    assert run.verdict == "dead"


def test_a_run_that_overflows_has_diverged() -> None:
    net = Quadratic([1e6])
    run = twin_run(net, value, [torch.ones(1, dtype=torch.float64)], torch.optim.SGD(net.parameters(), lr=1.0))
    assert run.verdict == "diverged"
    assert run.steps < 64


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"perturbation": "bit"}, "last-bit"),
        ({"perturbation": torch.ones(3)}, "shape"),
        ({"k": 0.0}, "`k`"),
    ],
    ids=["steps", "kind", "shape", "k"],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], match: str) -> None:
    net = Quadratic([1.0])
    with pytest.raises(ValueError, match=match):
        twin_run(net, value, [torch.ones(1)], torch.optim.SGD(net.parameters(), lr=0.1), **wrong)


# ---------------------------------------------------------------- learning rates told apart


def noisy_digits() -> list[Any]:
    """Digits with 30 % random labels, in 400 batches of 64; on clean labels nothing amplifies at any rate."""
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float64).view(-1, 1, 8, 8) / 16
    x = ((x - x.mean()) / x.std())[:1437]
    g = torch.Generator().manual_seed(0)
    y = torch.tensor(y)[:1437]
    y = torch.where(torch.rand(1437, generator=g) < 0.3, torch.randint(10, (1437,), generator=g), y)
    return [(x[i], y[i]) for i in (torch.randint(1437, (64,), generator=g) for _ in range(400))]


def growth(lr: float, steps: int) -> TwinRun:
    torch.manual_seed(7)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    return twin_run(net, cross_entropy, noisy_digits(), optimizer, steps=steps, perturbation="random")


@pytest.mark.slow
def test_a_high_learning_rate_amplifies_and_low_ones_do_not() -> None:
    high = growth(0.4, 160)
    assert max(high.gain[:160]) > 1e5
    assert high.verdict == "amplifying"
    for lr in (0.05, 0.01):
        low = growth(lr, 400)
        assert max(low.gain) < 10
        assert low.verdict == "neutral"
