"""Critical curvature of the optimizers on a smoothed loss, against the spectral radius of their real steps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eos_monitor import critical_curvature
from eos_monitor.optim import BurgersSGD, ElasticSGD, EntropySGD, HamiltonJacobi, HeatSmoothing

EDGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "entropy": (EntropySGD, {}),
    "entropy-pulled-hard": (EntropySGD, {"lr": 1.0, "gamma": 0.2}),
    "entropy-short": (EntropySGD, {"evaluations": 3, "averaging": 0.3, "lr": 2.0}),
    "entropy-momentum": (EntropySGD, {"inner_momentum": 0.9, "evaluations": 7}),
    "hamilton-jacobi": (HamiltonJacobi, {}),
    "hamilton-jacobi-narrow": (HamiltonJacobi, {"gamma": 0.1}),
    "hamilton-jacobi-even": (HamiltonJacobi, {"lr": 0.1, "evaluations": 4}),
    "hamilton-jacobi-nesterov": (HamiltonJacobi, {"lr": 0.3, "momentum": 0.9, "nesterov": True, "gamma": 0.1}),
    "heat": (HeatSmoothing, {"gamma": 0.0}),
    "heat-momentum": (HeatSmoothing, {"gamma": 0.0, "momentum": 0.9}),
    "heat-nesterov": (HeatSmoothing, {"gamma": 0.0, "momentum": 0.9, "nesterov": True}),
    "burgers": (BurgersSGD, {}),
    "burgers-near-its-limit": (BurgersSGD, {"gamma": 0.11}),
    "burgers-momentum": (BurgersSGD, {"inner_momentum": 0.8, "evaluations": 4}),
    "elastic": (ElasticSGD, {}),
    "elastic-slow": (ElasticSGD, {"workers": 2, "evaluations": 4, "moving_rate": 0.3, "gamma": 0.2}),
    "elastic-momentum": (ElasticSGD, {"workers": 2, "evaluations": 3, "momentum": 0.9}),
    "elastic-nesterov": (ElasticSGD, {"workers": 2, "evaluations": 2, "momentum": 0.9, "nesterov": True}),
    "elastic-lone": (ElasticSGD, {"workers": 1, "evaluations": 5}),
    "elastic-lone-nesterov": (ElasticSGD, {"workers": 1, "evaluations": 2, "momentum": 0.9, "nesterov": True}),
    "elastic-lone-uncoupled": (ElasticSGD, {"workers": 1, "gamma": math.inf}),
}


def radius(cls: Any, settings: dict[str, Any], hessian: Tensor) -> float:
    """Spectral radius of one step of the real optimizer, its matrix read off column by column."""
    x = nn.Parameter(torch.ones(len(hessian), dtype=torch.float64))
    optimizer = cls([x], scoping=0.0, **settings)

    def closure() -> float:
        x.grad = hessian @ x.detach()
        return 0.0

    optimizer.step(closure)  # creates the state
    parts = [x.data, *(value for value in optimizer.state[x].values() if isinstance(value, Tensor))]
    names = [key for key, value in optimizer.state[x].items() if isinstance(value, Tensor)]
    columns = []
    for unit in torch.eye(sum(part.numel() for part in parts), dtype=torch.float64):
        pieces = unit.split([part.numel() for part in parts])
        x.data.copy_(pieces[0])
        for name, piece, part in zip(names, pieces[1:], parts[1:], strict=True):
            optimizer.state[x][name] = piece.view(part.shape).clone()
        optimizer.step(closure)
        columns.append(torch.cat([x.detach().flatten(), *(optimizer.state[x][name].flatten() for name in names)]))
    return float(torch.linalg.eigvals(torch.stack(columns, 1)).abs().max())


@pytest.mark.parametrize("name", EDGES)
def test_critical_curvature_is_where_the_real_step_turns_unstable(name: str) -> None:
    cls, settings = EDGES[name]
    decay = 0.1
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    curvature = critical_curvature(cls([x], weight_decay=decay, **settings))
    assert curvature.c is not None
    assert curvature.l2.tolist() == [decay, decay]
    c = float(curvature.c[0])
    # A rotated Hessian, whose second eigenvalue is far inside.
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)

    def unstable(top: float) -> bool:
        eigenvalues = torch.tensor([top, 0.3 * top], dtype=torch.float64) - decay
        # Without stiffness from a smaller mode: rounding of a 14 × 14 matrix's defective eigenvalues stays below this.
        return radius(cls, {"weight_decay": decay, **settings}, turn @ torch.diag(eigenvalues) @ turn.T) > 1 + 1e-9

    assert not any(unstable(share * c) for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99))
    low = 0.99 * c
    high = 1.01 * c
    assert unstable(high)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if unstable(middle) else (middle, high)
    # The radius passes 1 with a slope of order one in λ/c: 1e-9 in it is 1e-9 in λ, or its root where modes collide.
    assert low == pytest.approx(c, rel=1e-6)


def test_threshold_only_where_c_is_a_multiple_of_one_over_lr() -> None:
    x = nn.Parameter(torch.ones(2))
    assert critical_curvature(HeatSmoothing([x], momentum=0.9)).threshold == pytest.approx(3.8)
    assert critical_curvature(EntropySGD([x])).threshold is None


def test_critical_curvature_follows_scoping() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = HamiltonJacobi([x], scoping=0.5, gamma=4.0)
    before = critical_curvature(optimizer).c[0]
    optimizer.step(lambda: x.square().sum().backward())
    after = critical_curvature(optimizer).c[0]
    assert after == critical_curvature(HamiltonJacobi([x], gamma=2.0)).c[0]
    assert after != before


def test_no_learning_rate_has_no_edge() -> None:
    x = nn.Parameter(torch.ones(2))
    for cls in (EntropySGD, HamiltonJacobi, HeatSmoothing, BurgersSGD, ElasticSGD):
        assert critical_curvature(cls([x], lr=0.0)).c.tolist() == [math.inf, math.inf]


def test_spring_too_stiff_for_any_curvature_is_past_the_edge() -> None:
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    for optimizer in (EntropySGD([x], gamma=0.04, lr=0.04), BurgersSGD([x], gamma=0.04), ElasticSGD([x], gamma=0.04)):
        assert 0 < float(critical_curvature(optimizer).c[0]) < 1e-9
