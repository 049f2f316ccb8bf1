"""The papers' bound on their own one-layer equation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eos_monitor.cfl.capture import capture
from eos_monitor.cfl.paper_bound import paper_bound
from eos_monitor.cfl.tiers import estimate_cfl
from eos_monitor.isolation.sandbox import Sandbox
from tests.cfl.layer_nets import NETS, make

A = -0.5  # of the linear equation, with β = 1


def checkerboard(size: int = 256) -> Tensor:
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.where((row + column) % 2 == 0, -1.0, 1.0).double()[None, None]


@pytest.mark.parametrize("width", [16, 32, pytest.param(64, marks=pytest.mark.slow)])
def test_window_aware_bound_of_the_one_layer_equation(width: int) -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, width, bias=False, dtype=torch.float64), nn.SiLU())
    image = checkerboard()
    with Sandbox(net) as sandbox, torch.no_grad():
        stand_ins = {p: p.detach() for p in net.parameters()}
        (call,) = capture(sandbox, net, lambda m, x: m(x).sum(), image, parameters=stand_ins, graph=False).layers
    behind = torch.full((1, 1, 257 - width, 257 - width), A).double()
    assert call.activation is not None
    bound = paper_bound([call], [behind], call.activation.activation)
    # Only two patches, ±c: the matrix has rank one, and solving it is exact to rounding.
    assert bound.alpha_min() == pytest.approx(width**2 * (257 - width) ** 2 / 4, rel=1e-6)
    # ¼ max |Î|²: the image's own frequency has all of it.
    assert bound.alpha_min(window=False) == pytest.approx(256**4 / 4, rel=1e-6)


def test_bound_follows_the_linearization_of_a_layer() -> None:
    """With z ≈ 0 and a constant gradient behind the activation, the bound with a window is the block's λ_max."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 1, 3, stride=2, bias=False, dtype=torch.float64), nn.SiLU())
    nn.init.zeros_(net[0].weight)
    x = torch.randn(6, 2, 9, 9, dtype=torch.float64)

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return m(batch).sum() / len(batch)

    patches = F.unfold(x, 3, stride=2).transpose(1, 2).reshape(-1, 18)
    curvature = float(torch.linalg.eigvalsh(0.5 / 6 * patches.T @ patches)[-1])  # r″(0) = ½
    (estimate,) = estimate_cfl(net, loss, [x], paper_bound=True, exact=True)
    assert estimate.paper_bound is not None
    assert estimate.paper_bound.window_curvature == pytest.approx(curvature, rel=1e-6)
    assert estimate.curvature == pytest.approx(curvature, rel=1e-6)
    assert estimate.paper_bound.lr_max(0.5) == pytest.approx(2 / (0.5 + curvature), rel=1e-6)


@pytest.mark.parametrize("name", ["silu-convs", "strange-convs", "autoencoder", "conv1d", "transformer", "tanh-mlp"])
def test_bounds_of_nets_are_finite_and_the_window_only_lowers_them(name: str) -> None:
    spec = NETS[name]
    estimates = estimate_cfl(make(name), spec.loss, [spec.data()], paper_bound=True)
    bounds = [e.paper_bound for e in estimates if e.paper_bound is not None]
    assert bounds
    for bound in bounds:
        assert 0.0 <= bound.window_curvature <= bound.curvature * (1 + 1e-6) < float("inf")
    if name == "strange-convs":  # no bend in ReLU
        assert {bound.curvature for bound in bounds} == {0.0}


def test_no_bound_unless_asked_for() -> None:
    spec = NETS["conv1d"]
    assert all(e.paper_bound is None for e in estimate_cfl(make("conv1d"), spec.loss, [spec.data()]))
