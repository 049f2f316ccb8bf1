"""Method "fd": central differences of the gradient in place of double backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from eos_monitor import HessianOperator, measure_stability


def data(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(64, 6, generator=g).to(dtype), torch.randint(3, (64,), generator=g)


def net(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(6, 12), nn.ReLU() if kind == "relu" else nn.Tanh(), nn.Linear(12, 3))
    if kind == "weight-norm":
        parametrizations.weight_norm(layers[0])
    return layers.to(dtype)


def loss_fn(module: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def dense(module: nn.Module, batch: Any) -> torch.Tensor:
    """Hessian in float64 of the loss as a function of plain weights, written out."""
    module = module.double()
    names = [name for name, _ in module.named_parameters()]
    shapes = [p.shape for p in module.parameters()]
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    x, y = batch[0].double(), batch[1]

    def value(theta: torch.Tensor) -> torch.Tensor:
        parts = torch.split(theta, [s.numel() for s in shapes])
        by_name = {name: part.view(s) for name, part, s in zip(names, parts, shapes, strict=True)}
        if "0.parametrizations.weight.original0" in by_name:
            g, v = by_name["0.parametrizations.weight.original0"], by_name["0.parametrizations.weight.original1"]
            weight = g * v / v.square().sum(1, keepdim=True).sqrt()
            hidden = (x @ weight.T + by_name["0.bias"]).tanh()
        else:
            pre = x @ by_name["0.weight"].T + by_name["0.bias"]
            hidden = pre.relu() if isinstance(module[1], nn.ReLU) else pre.tanh()
        return F.cross_entropy(hidden @ by_name["2.weight"].T + by_name["2.bias"], y)

    return torch.autograd.functional.hessian(value, flat)


@pytest.mark.parametrize("kind", ["tanh", "weight-norm"])
@pytest.mark.parametrize(
    # The step balances truncation, step², against rounding, eps / step: some 1e-5 in float32, 1e-10 in float64; on the
    # eigenvalue the error of the product counts in full only where the top pair is close.
    ("dtype", "tolerance"),
    [(torch.float32, 1e-3), (torch.float64, 1e-7)],
    ids=["float32", "float64"],
)
def test_reading_agrees_with_the_dense_hessian(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    module, batch = net(kind, dtype), data(dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    reading = measure_stability(module, loss_fn, [batch], optimizer, method="fd", full_batch=True)
    truth = float(torch.linalg.eigvalsh(dense(module, batch))[-1])
    assert reading.converged
    assert reading.method == "fd"
    assert reading.sharpness == pytest.approx(truth, rel=tolerance)


def test_weight_norm_is_wrong_by_double_backward_and_right_by_finite_differences() -> None:
    module, batch = net("weight-norm", torch.float64), data(torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    refused = measure_stability(module, loss_fn, [batch], optimizer)
    assert refused.edge_ratio is None
    assert any("method='fd'" in note for note in refused.notes)
    assert measure_stability(module, loss_fn, [batch], optimizer, method="fd").edge_ratio is not None


def test_product_is_linear_in_length_and_zero_for_zero() -> None:
    module, batch = net("tanh", torch.float64), data(torch.float64)
    hessian = HessianOperator(module, loss_fn, [batch], method="fd")
    v = torch.randn(hessian.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # The step is along the unit vector, so length enters as a factor: only its own rounding is left.
    torch.testing.assert_close(hessian.matvec(1e-6 * v), 1e-6 * hessian.matvec(v), rtol=1e-6, atol=1e-14)
    assert not hessian.matvec(torch.zeros_like(v)).any()


def test_kinks_in_float32_are_told_and_never_pass_as_converged_when_wrong() -> None:
    module, batch = net("relu", torch.float32), data(torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    reading = measure_stability(module, loss_fn, [batch], optimizer, method="fd", full_batch=True)
    truth = float(torch.linalg.eigvalsh(dense(module, batch))[-1])
    if reading.converged:
        assert reading.sharpness == pytest.approx(truth, rel=0.02)
    else:
        assert reading.edge_ratio is None or any("inexact" in note for note in reading.notes)


def test_training_is_untouched() -> None:
    module, batch = net("tanh", torch.float32), data(torch.float32)
    before = [(p.clone(), p._version) for p in module.parameters()]
    HessianOperator(module, loss_fn, [batch], method="fd").matvec(
        torch.ones(sum(p.numel() for p in module.parameters()))
    )
    for p, (value, version) in zip(module.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p._version == version
        assert p.grad is None


def test_step_of_an_earlier_operator_is_not_calibrated_again() -> None:
    module, batch = net("tanh", torch.float64), data(torch.float64)
    evaluations: list[int] = []

    def counted(module: Any, batch: Any) -> torch.Tensor:
        evaluations.append(1)
        return loss_fn(module, batch)

    first = HessianOperator(module, counted, [batch], method="fd")
    v = torch.ones(first.size, dtype=torch.float64)
    product = first.matvec(v)
    assert len(evaluations) == 6 + 2  # three sizes are compared, then the product is taken
    evaluations.clear()
    assert torch.equal(HessianOperator(module, counted, [batch], method="fd", step=first.step).matvec(v), product)
    assert len(evaluations) == 2
