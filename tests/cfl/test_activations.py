"""Borders and second derivatives of activations against finite differences of torch's own functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eos_monitor.cfl.activations import Activation, is_activation, read_activation, swish
from eos_monitor.cfl.partition import ACTIVATED, NOT_ACTIVATED, TRANSITIONING, numeric_partition

H = 1e-3
# 4th order in H: 1e-12 times a sixth derivative of order 10; rounding 1e-16 / H² = 1e-10 times |r| up to 10
SECOND_ERROR = 1e-8


def call(name: str, *args: Any, **kwargs: Any) -> Activation:
    activation = read_activation(name, args, kwargs)
    assert activation is not None
    return activation


def differences(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """r′ and r″ by five-point differences."""
    two, one, mid, minus, last = (function(z + k * H) for k in (2, 1, 0, -1, -2))
    first = (-two + 8 * one - 8 * minus + last) / (12 * H)
    second = (-two + 16 * one - 30 * mid + 16 * minus - last) / (12 * H**2)
    return first, second


SMOOTH: dict[str, tuple[Activation, Callable[[Tensor], Tensor]]] = {
    "silu": (call("silu"), F.silu),
    "swish-3": (swish(3.0), lambda z: z * torch.sigmoid(3 * z)),
    "quick-gelu": (swish(1.702), lambda z: z / (1 + torch.exp(-1.702 * z))),
    "gelu": (call("gelu"), F.gelu),
    "gelu-tanh": (call("gelu", approximate="tanh"), lambda z: F.gelu(z, approximate="tanh")),
    "mish": (call("mish"), F.mish),
    "softplus": (call("softplus"), F.softplus),
    "softplus-3": (call("softplus", 3.0), lambda z: F.softplus(z, 3.0)),
    "tanh": (call("tanh"), torch.tanh),
    "sigmoid": (call("sigmoid"), torch.sigmoid),
    "elu": (call("elu"), F.elu),
    "elu-1.5": (call("elu", 1.5), lambda z: F.elu(z, 1.5)),
    "elu-0.4": (call("elu", alpha=0.4), lambda z: F.elu(z, 0.4)),
    "elu-3": (call("elu", 3.0), lambda z: F.elu(z, 3.0)),
    "selu": (call("selu"), F.selu),
    "celu-2": (call("celu", 2.0), lambda z: F.celu(z, 2.0)),
    "hardswish": (call("hardswish"), F.hardswish),
    "softsign": (call("softsign"), F.softsign),
    "tanhshrink": (call("tanhshrink"), F.tanhshrink),
    "logsigmoid": (call("logsigmoid"), F.logsigmoid),
    "erf": (call("erf"), torch.erf),
}
KINKED = {"elu-1.5": [0.0], "elu-0.4": [0.0], "elu-3": [0.0], "selu": [0.0]}


def jumps(name: str) -> list[float]:
    """Where r″ jumps, and in softplus, beyond its threshold, the function (by 7e-10)."""
    known = {"hardswish": [-3.0, 3.0], "softplus-3": [20 / 3]}
    return known.get(name, [0.0] if name in KINKED or name.startswith(("elu", "celu", "softsign")) else [])


def grid(*, without: list[float]) -> Tensor:
    z = torch.arange(-12.0, 12.0, 0.0007, dtype=torch.float64)
    for point in without:
        z = z[(z - point).abs() > 3 * H]  # where a difference would straddle a jump of r″
    return z


@pytest.mark.parametrize("name", SMOOTH)
def test_regimes_follow_the_rule(name: str) -> None:
    activation, function = SMOOTH[name]
    z = grid(without=jumps(name))
    first, second = differences(function, z)
    first = first.abs()
    second = second.abs()
    top = second.max()
    steep = first.max()
    wanted = torch.where(first >= steep / 2, ACTIVATED, NOT_ACTIVATED)
    wanted[second >= top / 2] = TRANSITIONING
    # A grid that leaves out 3e-3 around a jump of r″ misses its maximum by less than 1 % (|r‴| ≤ 3 |r″| there).
    clear = ((second - top / 2).abs() > 1e-2 * top) & (((first - steep / 2).abs() > 1e-2 * steep) | (second >= top / 2))
    found = activation.regimes(z)
    assert bool(clear.double().mean() > 0.98)
    assert torch.equal(found[clear], wanted[clear])
    assert set(found.tolist()) == set(wanted.tolist())
    assert list(activation.partition.kinks) == pytest.approx(KINKED.get(name, []))


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivative_is_that_of_the_function(name: str) -> None:
    activation, function = SMOOTH[name]
    z = grid(without=jumps(name))
    assert torch.allclose(activation.second_derivative(z), differences(function, z)[1], rtol=0, atol=30 * SECOND_ERROR)
    assert torch.allclose(activation.function(z), function(z), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "border"),
    # The table's own figures, to its digits.
    [("silu", 1.171), ("quick-gelu", 0.688), ("gelu", 0.794), ("softplus", 1.763), ("gelu-tanh", 0.793)],
)
def test_symmetric_borders_are_the_tabulated_ones(name: str, border: float) -> None:
    activation, _ = SMOOTH[name]
    at = torch.tensor([border - 1e-3, border + 1e-3], dtype=torch.float64)
    assert activation.regimes(at).tolist() == [TRANSITIONING, ACTIVATED]
    assert activation.regimes(-at).tolist() == [TRANSITIONING, NOT_ACTIVATED]


@pytest.mark.parametrize("name", ["silu", "gelu", "mish", "softplus", "tanh", "sigmoid", "hardswish", "elu", "celu-2"])
def test_numeric_rule_agrees_with_the_table(name: str) -> None:
    activation, function = SMOOTH[name]
    numeric = numeric_partition(function)
    scale = activation.scale
    assert numeric.regimes == activation.partition.regimes
    # linear interpolation on a grid of 1e-3: 1e-6; where r″ jumps, its maximum lies up to a step from the grid
    tolerance = 1e-3 if name in ("hardswish", "elu", "celu-2") else 2e-6
    assert numeric.borders == pytest.approx([b / scale for b in activation.partition.borders], abs=tolerance)


@pytest.mark.parametrize(
    ("activation", "kinks", "steep"),
    [
        (call("relu"), [0.0], lambda z: z > 0),
        (call("relu6"), [0.0, 6.0], lambda z: (z > 0) & (z < 6)),
        (call("leaky_relu", 0.2), [0.0], lambda z: z > 0),
        (call("leaky_relu", negative_slope=0.7), [0.0], lambda z: torch.ones_like(z, dtype=torch.bool)),
        (call("leaky_relu", -3.0), [0.0], lambda z: z < 0),
        (call("prelu", torch.tensor([0.25])), [0.0], lambda z: z > 0),
        (call("prelu", torch.tensor([0.25, 0.1])), [0.0], lambda z: z > 0),
        (call("hardtanh", -2.0, 0.5), [-2.0, 0.5], lambda z: (z > -2) & (z < 0.5)),
        (call("clamp", min=0), [0.0], lambda z: z > 0),
        (call("clip", -1, 1), [-1.0, 1.0], lambda z: z.abs() < 1),
        (call("clamp_min", 0.5), [0.5], lambda z: z > 0.5),
        (call("threshold", 0.1, 0.1), [0.1], lambda z: z > 0.1),
        (call("hardsigmoid"), [-3.0, 3.0], lambda z: z.abs() < 3),
    ],
    ids=lambda value: value.name if isinstance(value, Activation) else None,
)
def test_kinks_transition_within_reach(activation: Activation, kinks: list[float], steep: Any) -> None:
    z = torch.linspace(-8.0, 8.0001, 3000, dtype=torch.float64)  # never on a kink
    reach = torch.linspace(0.05, 0.3, 3000, dtype=torch.float64)
    wanted = torch.where(steep(z), ACTIVATED, NOT_ACTIVATED)
    assert torch.equal(activation.regimes(z), wanted)
    for kink in kinks:
        wanted = torch.where((z - kink).abs() <= reach, TRANSITIONING, wanted)
    assert torch.equal(activation.regimes(z, reach), wanted)
    assert activation.piecewise_linear
    assert not activation.second_derivative(z).any()


@pytest.mark.parametrize("reach", ["none", "width", "update"])
@pytest.mark.parametrize("name", ["silu", "tanh", "elu-1.5", "relu", "relu6"])
def test_counts_are_those_of_the_regimes(name: str, reach: str) -> None:
    activation = SMOOTH[name][0] if name in SMOOTH else call(name)
    z = 4.0 * torch.randn(2, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[0, :50] = 0.0
    z[1, :20] = 6.0
    z[1, 20:25] = float("nan")  # some of them exactly at kinks
    width = {"none": 0.0, "width": 0.1, "update": z.roll(1).abs().nan_to_num() / 10}[reach]
    wanted = torch.bincount(activation.regimes(z, width)[~z.isnan()], minlength=3)
    assert torch.equal(activation.counts(z, width), wanted)
    assert int(wanted.sum()) == z.numel() - 5


def test_scale_per_channel_moves_each_border() -> None:
    beta = torch.tensor([0.5, 2.0], dtype=torch.float64)[:, None]
    z = torch.tensor([[2.3, 2.4], [0.58, 0.59]], dtype=torch.float64)  # borders at 2.341 and 0.585
    assert swish(beta).regimes(z).tolist() == [[TRANSITIONING, ACTIVATED], [TRANSITIONING, ACTIVATED]]
    assert swish(beta).counts(z).tolist() == [0, 2, 2]


def test_threshold_of_softplus_cuts_its_band() -> None:
    activation = call("softplus", 1.0, 0.5)
    z = torch.tensor([-1.7, 0.49, 0.51, 1.7], dtype=torch.float64)
    assert activation.regimes(z).tolist() == [TRANSITIONING, TRANSITIONING, ACTIVATED, ACTIVATED]
    assert activation.second_derivative(z)[2:].tolist() == [0.0, 0.0]


def test_borders_hold_in_low_precision() -> None:
    z = torch.tensor([-1.18, -1.15, 1.15, 1.18], dtype=torch.bfloat16)
    assert call("silu").regimes(z).tolist() == [NOT_ACTIVATED, TRANSITIONING, TRANSITIONING, ACTIVATED]


def test_numeric_rule_finds_kinks_and_bends_together() -> None:
    """relu(z)²: r″ = 2 above 0, where r′ has no jump; relu(tanh z) has one, and a bend besides."""
    squared = numeric_partition(lambda z: F.relu(z).square())
    assert (squared.regimes, squared.kinks) == ((NOT_ACTIVATED, TRANSITIONING), ())
    assert squared.borders == pytest.approx((0.0,), abs=5e-4)
    bent = numeric_partition(lambda z: F.relu(torch.tanh(z)))
    assert bent.kinks == pytest.approx((0.0,), abs=5e-4)
    assert bent.regimes == (NOT_ACTIVATED, ACTIVATED, TRANSITIONING, NOT_ACTIVATED)
    assert bent.borders == pytest.approx((0.0, 0.2032656, 1.3963123), abs=5e-4)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("matmul", ()),
        ("clamp", ()),
        ("clamp", (torch.zeros(3),)),
        ("threshold", (1.0, 0.0)),
        ("prelu", (torch.tensor([0.1, 0.9]),)),
    ],
)
def test_what_has_no_regimes_is_none(name: str, args: Any) -> None:
    assert read_activation(name, args) is None
    assert is_activation(name) == (name != "matmul")


def test_function_that_is_not_elementwise_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a function of single numbers, got one that fails"):
        numeric_partition(lambda z: torch.tanh(z) * torch.ones(3))
