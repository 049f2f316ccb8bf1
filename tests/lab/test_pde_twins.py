"""Twin runs of the one-layer net: rounding dies out below the edge and reaches the solution in the chaotic band."""

from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eos_monitor.lab.pde_cases import one_layer_pde
from eos_monitor.perturbation import TwinRun, twin_run

STEPS = 1000
PLACES = 225**2


class OneLayer(nn.Module):
    """The same loss for autograd: 50625 patches, which are ±c only, the first of them −c."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.kernel = nn.Parameter(kernel)

    def forward(self, patch: Tensor) -> Tensor:
        z = patch @ self.kernel
        plus = (PLACES // 2 + 1) / PLACES
        f = plus * F.silu(z) + (1 - plus) * F.silu(-z)
        return F.softplus(-f) + 10 * self.kernel.square().sum()


def twins_at(lr: float) -> TwinRun:
    start = next(one_layer_pde(lr))
    rows, columns = np.divmod(np.arange(len(start.state)), 32)
    patch = torch.as_tensor(np.where((rows + columns) % 2 == 0, -1.0, 1.0))
    net = OneLayer(torch.as_tensor(start.state))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    return twin_run(net, lambda module, batch: module(batch), [patch], optimizer, steps=STEPS, k=3.0)


@pytest.mark.parametrize("lr", [0.01, pytest.param(0.03, marks=pytest.mark.slow)])
def test_rounding_dies_out_below_the_edge(lr: float) -> None:
    twins = twins_at(lr)
    assert max(twins.relative_l1) > 0.0  # the twin was perturbed
    assert twins.relative_l1[-1] == 0.0
    assert twins.verdict == "attenuating"
    # The same flow as the closed form's: contracting, so that both stay within rounding of each other.
    losses = [moment.loss for moment in islice(one_layer_pde(lr), STEPS)]
    assert twins.losses == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize(
    "lr", [pytest.param(0.05, marks=pytest.mark.slow), pytest.param(0.07, marks=pytest.mark.slow), 0.09]
)
def test_rounding_reaches_the_solution_in_the_chaotic_band(lr: float) -> None:
    twins = twins_at(lr)
    assert max(twins.relative_l1) > 1.5
    assert twins.verdict == "amplifying"
    assert all(np.isfinite(twins.losses))  # restrained, not diverging
