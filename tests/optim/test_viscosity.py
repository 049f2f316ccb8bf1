"""Which equation BurgersSGD's viscosity belongs to, and the settings of Entropy-SGD's paper."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from eos_monitor.optim import BurgersSGD, EntropySGD

VISCOSITY = 0.3
TIME = 0.5
COPIES = 20_000
Y = np.linspace(-6.0, 6.0, 6001)  # the density has died out there, and the sum converges like exp(−1/spacing)


def drift(x: float, t: float) -> float:
    """E(x − y)/t under exp(−(f(y) + (y − x)²/2t)/ν), by quadrature, f = y⁴/4 − y²/2."""
    energy = Y**4 / 4 - Y**2 / 2 + (Y - x) ** 2 / (2 * t)
    weights = np.exp(-(energy - energy.min()) / VISCOSITY)
    return float(weights @ (x - Y) / weights.sum() / t)


def defect(viscosity: float) -> float:
    """The largest of |w_t + w·w_x − viscosity·w_xx| by central differences, on both wells and the hill between them."""
    h = 1e-3  # the differences are off by h² times derivatives of order 10, and by rounding over h²: both below 1e-4
    found = []
    for x in np.linspace(-1.5, 1.5, 31):
        w = drift(x, TIME)
        w_t = (drift(x, TIME + h) - drift(x, TIME - h)) / (2 * h)
        right, left = drift(x + h, TIME), drift(x - h, TIME)
        found.append(abs(w_t + w * (right - left) / (2 * h) - viscosity * (right - 2 * w + left) / h**2))
    return max(found)


def test_the_drift_solves_burgers_equation_with_half_the_viscosity() -> None:
    assert defect(VISCOSITY / 2) < 1e-4
    assert defect(VISCOSITY) > 0.1  # with ν itself it does not


@pytest.mark.parametrize("start", [-1.2, 0.0, 0.4, 1.0])
def test_the_optimizer_drifts_so(start: float) -> None:
    x = nn.Parameter(torch.full((COPIES,), start, dtype=torch.float64))
    lr = 0.01
    optimizer = BurgersSGD(
        [x],
        lr=lr,
        gamma=TIME,
        viscosity=VISCOSITY,
        evaluations=800,  # 16 relaxation times of the spring
        generator=torch.Generator().manual_seed(0),
    )

    def closure() -> float:
        x.grad = x.detach() ** 3 - x.detach()
        return 0.0

    optimizer.step(closure)
    moved = (start - x.detach()) / lr
    # five standard errors, and the bias of steps of δ, which is of order δ times curvatures of up to 5
    assert float(moved.mean()) == pytest.approx(
        drift(start, TIME), abs=5 * float(moved.std()) / math.sqrt(COPIES) + 2 * lr
    )


def test_the_published_entropy_sgd_takes_the_papers_step() -> None:
    """Written out from the paper on ½ h x²: L = 20, η′ = 0.1, α = 0.75, η = γ, and γ ← (1 − 1e-3)·γ."""
    h = np.array([0.3, 2.0])
    gamma = 0.5
    x = np.array([1.0, -2.0])
    parameter = nn.Parameter(torch.tensor(x))
    optimizer = EntropySGD.as_published([parameter], gamma=gamma)

    def closure() -> float:
        parameter.grad = torch.tensor(h) * parameter.detach()
        return 0.0

    step = gamma
    for _ in range(3):
        optimizer.step(closure)
        y, z = x.copy(), x.copy()
        for _ in range(20):
            y = y - 0.1 * (h * y + (y - x) / gamma)
            z = 0.75 * z + 0.25 * y
        x = x - step / gamma * (x - z)
        gamma *= 1 - 1e-3
    np.testing.assert_allclose(parameter.detach().numpy(), x, rtol=1e-12)
    assert EntropySGD.as_published([parameter], temperature=1e-4, lr=0.1).param_groups[0]["lr"] == 0.1
