"""Readings of losses that compute in short types, against dense Hessians of the same loss in double precision."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from eos_monitor import StabilityReading, measure_stability
from eos_monitor.readings.gauge import Gauge

# A cold solve spends 9 to 25 products on these nets in float32; 64 are those of one that never ends.
MOST_PRODUCTS = 40


class Short(nn.Module):
    """A net of three layers whose loss computes as one is told to."""

    def __init__(self, seed: int, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 12), activation(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class OnFrozenBase(nn.Module):
    """A frozen base in a short type under a head in float32."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 16).to(kind).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x.to(self.base.weight.dtype)).to(self.head[0].weight.dtype))


def examples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(48, 8, generator=generator), torch.randint(0, 3, (48,), generator=generator)


def plain(net: Any, batch: Any) -> Tensor:
    logits = net(batch[0])
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), batch[1])


def under_autocast(kind: torch.dtype) -> Callable[[Any, Any], Tensor]:
    def loss_fn(net: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=kind):
            return plain(net, batch)

    return loss_fn


def in_float64_refused(net: Any, batch: Any) -> Tensor:
    """A dtype that is written down."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = net.net[:2](batch[0])
        weight = net.net[2].weight.to(torch.bfloat16)
    if net.net[0].weight.dtype == torch.float64:
        raise TypeError("Expected float32.")
    return F.cross_entropy(net.net[3:]((hidden.to(torch.bfloat16) @ weight.T).float() + net.net[2].bias), batch[1])


def trained(net: nn.Module, kind: Any, steps: int, seed: int) -> Optimizer:
    optimizer: Optimizer = kind([p for p in net.parameters() if p.requires_grad], lr=0.1 if kind is SGD else 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        plain(net, examples(seed)).backward()
        optimizer.step()
    return optimizer


def exact_edge(net: nn.Module, optimizer: Optimizer, seed: int) -> float:
    """λ_max(C^-½ H C^-½) of the dense Hessian in double precision, C by its formulas."""
    wide = copy.deepcopy(net).double()
    named = [(name, p) for name, p in wide.named_parameters() if p.requires_grad]
    sizes = [p.numel() for _, p in named]
    x, y = examples(seed)

    def value(flat: Tensor) -> Tensor:
        pieces = torch.split(flat, sizes)
        stand_ins = {name: piece.view(p.shape) for (name, p), piece in zip(named, pieces, strict=True)}
        return F.cross_entropy(torch.func.functional_call(wide, stand_ins, (x.double(),)), y)

    start = torch.cat([p.detach().reshape(-1) for _, p in named])
    hessian = torch.autograd.functional.hessian(value, start)
    c = torch.cat([_critical(optimizer, p).double().reshape(-1) for p in optimizer.param_groups[0]["params"]])
    return float(torch.linalg.eigvalsh(hessian / torch.sqrt(c[:, None] * c))[-1])


def _critical(optimizer: Optimizer, p: Tensor) -> Tensor:
    """2/η under gradient descent; Adam with its second moment frozen, decay decoupled and none here."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, SGD):
        return torch.full_like(p, 2 / group["lr"], dtype=torch.float64)
    beta1, beta2 = group["betas"]
    state = optimizer.state[p]
    t = float(state["step"]) + 1
    root = (state["exp_avg_sq"].double() / (1 - beta2**t)).sqrt() + group["eps"]
    # The step of a momentum 1 − β1 with its bias corrected: (2 + 2β1) / (1 − β1) · (1 − β1ᵗ) / η.
    return (2 + 2 * beta1) / (1 - beta1) * (1 - beta1**t) / group["lr"] * root


def assert_told(reading: StabilityReading, expected: float) -> None:
    assert reading.edge_ratio is not None
    assert reading.error is not None
    assert reading.converged
    assert reading.matvecs <= MOST_PRODUCTS
    assert abs(reading.edge_ratio - expected) <= reading.error
    # Of use all the same: bfloat16 has 2^-8, and a ReLU's kinks double and redouble that.
    assert reading.error <= 0.05 * abs(expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_reading_of_a_loss_inside_autocast_converges_within_its_error(
    kind: torch.dtype, activation: Any, seed: int
) -> None:
    net = Short(seed, activation)
    optimizer = trained(net, SGD, 20, seed)
    gauge = Gauge()
    for step in range(4):
        loss_fn = under_autocast(kind)
        reading = gauge.measure(net, loss_fn, [examples(seed)], [optimizer], step=step, full_batch=True).reading
        assert_told(reading, exact_edge(net, optimizer, seed))
        assert any("products are rounded" in note and str(kind)[6:] in note for note in reading.notes)
        optimizer.zero_grad()
        plain(net, examples(seed)).backward()
        optimizer.step()


def test_reading_under_adam_converges_within_its_error() -> None:
    net = Short(0)
    optimizer = trained(net, lambda p, lr: AdamW(p, lr=lr, weight_decay=0.0), 40, 0)
    reading = measure_stability(net, under_autocast(torch.bfloat16), [examples(0)], optimizer, full_batch=True)
    assert_told(reading, exact_edge(net, optimizer, 0))


def test_reading_of_parameters_in_bfloat16_converges_within_its_error() -> None:
    net = Short(1)
    trained(net, SGD, 20, 1)
    net.to(torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=0.1)
    x, y = examples(1)
    x = x.bfloat16()
    expected = exact_edge(net, optimizer, 1)  # of inputs that are not rounded: a 256th at most
    reading = measure_stability(net, plain, [(x, y)], optimizer, full_batch=True)
    assert_told(reading, expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_reading_of_a_head_on_a_frozen_base_in_a_short_type_has_its_rounding_in_the_error(kind: torch.dtype) -> None:
    net = OnFrozenBase(kind)
    optimizer = trained(net, SGD, 20, 0)
    reading = measure_stability(net, plain, [examples(0)], optimizer, full_batch=True)
    assert_told(reading, exact_edge(net, optimizer, 0))


def test_a_loss_that_refuses_double_precision_has_an_error_all_the_same() -> None:
    net = Short(0)
    optimizer = trained(net, SGD, 20, 0)
    reading = measure_stability(net, in_float64_refused, [examples(0)], optimizer, full_batch=True)
    assert_told(reading, exact_edge(net, optimizer, 0))
    assert any("refuses double precision" in note for note in reading.notes)


def test_a_tolerance_that_rounding_forbids_is_not_converged_and_soon_told() -> None:
    net = Short(0)
    optimizer = trained(net, SGD, 20, 0)
    loss_fn = under_autocast(torch.bfloat16)
    reading = measure_stability(net, loss_fn, [examples(0)], optimizer, full_batch=True, rtol=1e-5)
    assert not reading.converged
    assert reading.matvecs <= MOST_PRODUCTS


@pytest.mark.parametrize("batches", [1, 3])
def test_a_loss_in_float32_pays_nothing(batches: int) -> None:
    """No product, and no evaluation: two solves, a check of one product and four gradients, and none at the second."""
    net = Short(0)
    optimizer = trained(net, SGD, 5, 0)
    calls = []

    def loss_fn(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        return plain(module, batch)

    gauge = Gauge()
    probe = [examples(seed) for seed in range(batches)]
    first = gauge.measure(net, loss_fn, probe, [optimizer], step=0, full_batch=True).reading
    assert len(calls) == (1 + 4 if batches == 1 else 3 * (first.matvecs + 1 + 4))
    assert not any("rounded" in note for note in first.notes)
