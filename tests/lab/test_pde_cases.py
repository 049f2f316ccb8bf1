"""The recipes against numbers that were worked out without them, and what the detector says of them."""

import numpy as np
import pytest
import torch

from eos_monitor import InstabilityDetector, Verdict
from eos_monitor.lab.pde_cases import Moment, beltrami, heat, one_layer_pde, watch

STABLE = Verdict.STABLE
RESTRAINED = Verdict.RESTRAINED
DIVERGING = Verdict.DIVERGING
SEEDS = (7, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1, 2, 3)))


def after(flow, steps: int) -> Moment:
    for _ in range(steps):
        next(flow)
    return next(flow)


def net_loss(kernel: torch.Tensor, decay: float = 20.0) -> torch.Tensor:
    """The whole convolution on the whole image, without the two patches."""
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.where((rows + columns) % 2 == 0, -1.0, 1.0).double()
    features = torch.nn.functional.silu(torch.nn.functional.conv2d(image[None, None], kernel.view(1, 1, 32, 32)))
    out = features.mean()
    return torch.nn.functional.softplus(-out) + decay / 2 * kernel.square().sum()


def test_one_layer_step_is_that_of_the_whole_convolution() -> None:
    flow = one_layer_pde(0.03)
    first = next(flow)
    second = next(flow)
    kernel = torch.as_tensor(first.state).requires_grad_()
    loss = net_loss(kernel)
    (gradient,) = torch.autograd.grad(loss, kernel)
    # float64 sums over 50,625 places
    assert first.loss == pytest.approx(loss.item(), rel=1e-12)
    assert second.state == pytest.approx(first.state - 0.03 * gradient.numpy(), abs=1e-10)


def test_one_layer_minimum_has_the_curvature_of_the_critical_learning_rate() -> None:
    end = after(one_layer_pde(0.01), 1000)
    assert end.sharpness == pytest.approx(62.0, abs=0.3)  # 2 / 62.0 is the paper's 0.03
    assert end.loss == pytest.approx(0.2915, abs=3e-4)


@pytest.mark.parametrize("steps", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_one_layer_sharpness_is_a_finite_difference(steps: int) -> None:
    now = after(one_layer_pde(0.04), steps)
    kernel = torch.as_tensor(now.state)
    mode = torch.as_tensor(now.mode)

    def slope(at: float) -> torch.Tensor:
        moved = (kernel + at * mode).requires_grad_()
        return torch.autograd.grad(net_loss(moved), moved)[0]

    h = 1e-4  # third derivatives of order 1e3 give a relative error of 1e-6 or so
    product = (slope(h) - slope(-h)) / (2 * h)
    assert now.sharpness == pytest.approx(float(mode @ product), rel=1e-4)
    assert (product - now.sharpness * mode).norm() < 1e-2 * now.sharpness


@pytest.mark.parametrize(("dt", "rate"), [(0.4, "slowest"), (0.8, "fastest")])
def test_heat_changes_at_the_rate_of_its_extreme_mode(dt: float, rate: str) -> None:
    # amplification 1 − 4 dt sin²(π j / 60) of the odd modes j, the only ones in a symmetric start
    amplification = abs(1 - 4 * dt * np.sin(np.pi * (1 if rate == "slowest" else 29) / 60) ** 2)
    flow = heat(dt)
    early = after(flow, 300).state
    late = after(flow, 19).state  # twenty steps apart
    # by then the other modes add less than a thousandth
    assert np.log(np.abs(late).max() / np.abs(early).max()) / 20 == pytest.approx(np.log(amplification), rel=0.01)


@pytest.mark.parametrize("multiple", [1.0, 30.0])
def test_beltrami_follows_its_energy(multiple: float) -> None:
    flow = beltrami(multiple)
    now = after(flow, 5)
    then = next(flow)
    u = torch.as_tensor(now.state).requires_grad_()
    image = torch.as_tensor(next(beltrami(1.0)).state)

    def energy(u: torch.Tensor) -> torch.Tensor:
        return (u.diff().square() + 1e-6).sqrt().sum() + 2.5 * (u - image).square().sum()

    (gradient,) = torch.autograd.grad(energy(u), u)
    assert now.loss == pytest.approx(energy(u).item(), rel=1e-12)
    assert then.state == pytest.approx(now.state - multiple * 5e-4 * gradient.numpy(), abs=1e-10)
    top = torch.linalg.eigvalsh(torch.autograd.functional.hessian(energy, u.detach()))[-1]
    assert now.sharpness == pytest.approx(float(top), rel=1e-10)


# Verdicts. The end state is that of all of the last hundred steps.


def ends_in(verdicts: list[Verdict], expected: Verdict) -> bool:
    return set(verdicts[-100:]) == {expected}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lr", [0.01, 0.03])
def test_one_layer_below_the_edge_is_stable(lr: float, seed: int) -> None:
    verdicts = watch(one_layer_pde(lr, seed), 1000, seed=seed)
    assert ends_in(verdicts, STABLE)
    assert DIVERGING not in verdicts


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lr", [0.035, 0.04, 0.045, 0.05, 0.06, 0.07, 0.09, 0.0999])
def test_one_layer_between_the_edges_is_restrained_and_never_diverging(lr: float, seed: int) -> None:
    verdicts = watch(one_layer_pde(lr, seed), 1000, seed=seed)
    assert ends_in(verdicts, RESTRAINED)
    assert DIVERGING not in verdicts


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lr", [0.101, 0.105, 0.11, 0.13])
def test_one_layer_above_all_edges_is_diverging(lr: float, seed: int) -> None:
    late: list[int | None] = []
    verdicts = watch(one_layer_pde(lr, seed), 1000, seed=seed, tell=lambda d: late.append(d.lateness))
    assert ends_in(verdicts, DIVERGING)
    confirmed = verdicts.index(DIVERGING)
    assert verdicts[confirmed:] == [DIVERGING] * (len(verdicts) - confirmed)
    assert late[confirmed] is not None
    assert 0 < late[confirmed] <= 24


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("dt", "expected"), [(0.4, STABLE), (0.8, DIVERGING)])
def test_heat(dt: float, expected: Verdict, seed: int) -> None:
    assert ends_in(watch(heat(dt, seed), 400, seed=seed), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("multiple", "steps", "expected"), [(10, 1500, RESTRAINED), (100, 1500, RESTRAINED), (1000, 200, DIVERGING)]
)
def test_beltrami_beyond_the_edge(multiple: float, steps: int, expected: Verdict, seed: int) -> None:
    verdicts = watch(beltrami(multiple, seed), steps, seed=seed)
    assert set(verdicts[-50:]) == {expected}
    assert (DIVERGING in verdicts) == (expected is DIVERGING)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_beltrami_at_its_stable_step_is_stable(seed: int) -> None:
    verdicts = watch(beltrami(1, seed), 10_000, seed=seed)
    assert ends_in(verdicts, STABLE)
    assert DIVERGING not in verdicts


def test_oscillation_and_amplification_are_told_apart() -> None:
    """At lr 0.04 the kernel oscillates for ever and nothing grows; at 0.13 it grows."""
    seen: list[InstabilityDetector] = []
    watch(one_layer_pde(0.04), 500, tell=seen.append)
    assert seen[-1].oscillation.period is not None
    assert seen[-1].oscillation.amplification == pytest.approx(0.0, abs=0.01)
    growing: list[float | None] = []
    watch(one_layer_pde(0.13), 60, tell=lambda d: growing.append(d.oscillation.amplification))
    # the kernel across the patch grows by |1 − 0.13 · 20| = 1.6 a step
    assert growing[-1] == pytest.approx(np.log(1.6), rel=0.05)
