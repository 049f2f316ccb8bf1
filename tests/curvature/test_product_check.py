"""The self-check of products on fields whose Jacobian is written down: each tolerance from both sides."""

import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eos_monitor import HessianOperator
from eos_monitor.curvature.finite_differences import (
    CheckedProduct,
    ProductCheck,
    calibrated_step,
    central_differences,
    check_product,
)
from eos_monitor.readings.products import check_products

N = 5
BASE = torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
H = BASE + BASE.T
E = torch.nn.functional.normalize(torch.arange(1.0, N + 1, dtype=torch.float64), dim=0)


def never() -> Any:
    raise AssertionError("nobody has to look")


def refuses_double(gradient: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def narrow(shift: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if dtype == torch.float64:
            raise RuntimeError("expected Float but got Double")
        return gradient(shift)

    return narrow


def checked(off: float = 0.0, jacobian: Tensor = H, **given: Any) -> CheckedProduct:
    """The product with E, too large by a factor of ``1 + off``."""

    def gradient(shift: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return jacobian @ shift.double() + 1.0

    settings = {"rounding": 1e-6, "error": None, "computed": lambda: torch.float32, "in_double": lambda v: jacobian @ v}
    return CheckedProduct(product=(1 + off) * (jacobian @ E), gradient=gradient, **(settings | given))


def relative(off: float) -> float:
    """Distance over the greater length."""
    return abs(off) / max(1.0, 1.0 + off)


@pytest.mark.parametrize(
    ("off", "given", "passed"),
    [
        (0.0, {}, True),
        (0.0099, {}, True),
        (-0.0099, {}, True),
        (0.0103, {}, False),
        (-0.0101, {}, False),
        (-2.0, {}, False),
        # products that round, and products that are finite differences themselves
        (-0.049, {"rounding": 0.05}, True),
        (-0.051, {"rounding": 0.05}, False),
        (-0.059, {"error": 0.02}, True),
        (-0.061, {"error": 0.02}, False),
        (-0.0099, {"error": 0.0}, True),
        (-0.119, {"error": 0.1}, True),
        (-0.121, {"error": 0.1}, False),
    ],
)
def test_a_product_may_be_off_by_what_explains_it(off: float, given: dict[str, Any], passed: bool) -> None:
    check = check_product(checked(off, **given), E)
    assert check.passed is passed
    assert check.mismatch == pytest.approx(relative(off), abs=1e-6)
    assert check.uncertainty < 1e-6
    assert check.dtype == torch.float64
    assert check.asymmetry == 0.0  # H is symmetric, whatever the product


@pytest.mark.parametrize(
    ("off", "computed", "double", "passed"),
    [
        (-0.12, torch.bfloat16, 0.0, True),  # 16 roundings are 0.125
        (-0.13, torch.bfloat16, 0.0, False),
        (-0.12, torch.bfloat16, 0.0099, True),
        (-0.12, torch.bfloat16, 0.0103, False),
        (-0.015, torch.float16, 0.0, True),  # 0.0156
        (-0.016, torch.float16, 0.0, False),
        (-0.015, torch.float32, 0.0, False),
    ],
)
def test_a_loss_in_low_precision_is_right_if_it_is_right_in_double(
    off: float, computed: torch.dtype, double: float, passed: bool
) -> None:
    given = {"computed": lambda: computed, "in_double": lambda v: (1 + double) * (H @ v)}
    check = check_product(checked(off, **given), E)
    assert (check.passed, check.computed) == (passed, computed)


def test_nobody_looks_at_the_precision_of_a_product_that_is_right() -> None:
    check = check_product(checked(0.005, computed=never, in_double=never), E)
    assert check.passed


def test_it_is_checked_in_single_precision_where_double_is_refused() -> None:
    one = checked(-0.0099)
    check = check_product(replace(one, gradient=refuses_double(one.gradient), computed=never), E)
    assert (check.passed, check.dtype) == (True, torch.float32)
    one = checked(-0.0101)
    check = check_product(replace(one, gradient=refuses_double(one.gradient), computed=never, in_double=never), E)
    assert (check.passed, check.dtype) == (False, torch.float32)


@pytest.mark.parametrize(
    ("jump", "off", "passed"),
    [(3e-5, 0.078, True), (3e-5, 0.079, False), (1e-4, 0.119, True), (1e-4, 0.121, False)],
)
def test_kinks_within_single_steps_explain_three_times_what_the_steps_differ_by(
    jump: float, off: float, passed: bool
) -> None:
    """The gradient jumps at ±5e-4 along E: a step of 1e-4 sees no jump, one of 1e-3 all of it, one of 1e-2 a tenth.

    The slopes are 1, 1.03 and 1.003 (1, 1.1, 1.01), so that the steps differ by at least 0.0262 (0.0818); more than
    0.12 is not allowed.
    """
    slope = H @ E

    def gradient(shift: Tensor) -> Tensor:
        along = float(shift.double() @ E)
        return H @ shift.double() + slope * jump * float(np.sign(along)) * (abs(along) > 5e-4)

    one = checked(computed=never, in_double=never)
    check = check_product(replace(one, gradient=refuses_double(gradient), product=(1 - off) * slope), E)
    assert check.uncertainty == pytest.approx({3e-5: 0.027 / 1.03, 1e-4: 0.09 / 1.1}[jump], rel=1e-3)
    assert check.mismatch == pytest.approx(off, rel=1e-3)
    assert check.passed is passed


@pytest.mark.parametrize(("length", "passed"), [(1e-5, True), (1e-4, False)])
def test_without_curvature_rounding_is_not_compared_with_rounding(length: float, passed: bool) -> None:
    """Gradients of 1e3 round to 2e-13, over a step of 1e-7; eight of these are 1.8e-5."""

    def flat(shift: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return 1e3 * E

    one = replace(checked(), gradient=flat, product=length * E, in_double=lambda v: 0.0 * v)
    check = check_product(one, E)
    assert check.passed is passed
    assert check.mismatch == (0.0 if passed else 1.0)


def skewed(by: float) -> Tensor:
    return H + by * (BASE - BASE.T)


def expected_asymmetry(jacobian: np.ndarray, product: np.ndarray) -> float:
    v = E.numpy()
    w = jacobian @ v - product
    w -= (w @ v) * v
    w /= np.linalg.norm(w)
    lengths = np.linalg.norm(jacobian @ v) * np.linalg.norm(jacobian @ w)
    return float(abs(v @ jacobian @ w - w @ jacobian @ v) / np.sqrt(lengths))


@pytest.mark.parametrize("by", [0.1, 0.5, 1.0])
def test_a_field_without_a_potential_is_told_by_its_asymmetry(by: float) -> None:
    """Double backward gives Jᵀv, differences J v."""
    jacobian = skewed(by)
    one = replace(checked(jacobian=jacobian), product=jacobian.T @ E, in_double=lambda v: jacobian.T @ v)
    check = check_product(one, E)
    assert not check.passed
    assert check.asymmetry == pytest.approx(expected_asymmetry(jacobian.numpy(), (jacobian.T @ E).numpy()), rel=1e-5)
    assert check.asymmetry > 0.01


@pytest.mark.parametrize(("by", "told"), [(1e-7, False), (1e-3, True)])
def test_differences_themselves_are_asked_for_symmetry_too(by: float, told: bool) -> None:
    check = check_product(checked(jacobian=skewed(by), error=0.0), E)
    assert (check.asymmetry > 0.0) is told
    assert check.passed is not told


def test_products_that_pass_by_double_backward_are_not_asked() -> None:
    assert check_product(checked(jacobian=skewed(1e-3)), E).asymmetry == 0.0


def test_one_parameter_is_always_symmetric() -> None:
    def gradient(shift: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return 3.0 * shift.double()

    one = torch.ones(1, dtype=torch.float64)
    given = replace(checked(), gradient=gradient, product=6.0 * one, in_double=lambda v: 6.0 * v)
    check = check_product(given, one)
    assert (check.passed, check.mismatch, check.asymmetry) == (False, pytest.approx(0.5), 0.0)


# Steps of finite differences.


def test_a_central_difference_is_exact_for_a_quadratic() -> None:
    found = central_differences(lambda shift: H @ shift + 1.0, E, (0.5, 2.0))
    for one in found:
        assert torch.allclose(one, H @ E, rtol=1e-12)


@pytest.mark.parametrize(
    ("jump_at", "jump", "size"),
    [
        (None, 0.0, 1e-5),  # smooth
        (5e-5, 1e-5, 1e-5),  # a kink within the largest step only: the two smaller agree
        (5e-6, 1e-6, 1e-4),  # one within the middle one: it is off most, and the largest is the best
        (0.0, 1e-9, 1e-5),  # a little in all of them, below a hundredth
        (0.0, 1e-7, 1e-5),
        (0.0, 2e-7, 1e-4),  # as rounding does: the smaller the step the worse
    ],
)
def test_the_step_is_the_middle_of_three_or_the_largest_where_rounding_rules(
    jump_at: float | None, jump: float, size: float
) -> None:
    slope = H @ E

    def gradient(shift: Tensor) -> Tensor:
        along = float(shift @ E)
        beyond = jump_at is not None and abs(along) > jump_at
        return H @ shift + slope * jump * float(np.sign(along)) * beyond

    step = calibrated_step(gradient, E, torch.float64)
    sizes = [1.0 + (jump / h if jump_at is not None and h > jump_at else 0.0) for h in (1e-4, 1e-5, 1e-6)]
    between = [abs(a - b) / max(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    assert step.size == size
    assert step.error == pytest.approx(min(between), abs=1e-8)


@pytest.mark.parametrize(
    ("dtype", "steps", "bend"),
    [(torch.float64, (1e-4, 1e-5, 1e-6), 1e7), (torch.float32, (1e-2, 1e-3, 1e-4), 1e3)],
    ids=["double", "single"],
)
def test_the_error_of_a_step_is_that_of_the_two_that_agree_best(
    dtype: torch.dtype, steps: tuple[float, float, float], bend: float
) -> None:
    """With a third derivative a difference is off by ``bend`` · h²: 0.1, 1e-3 and 1e-5 at the three steps."""

    def gradient(shift: Tensor) -> Tensor:
        along = float(shift.double() @ E)
        return (along + bend * along**3) * E

    step = calibrated_step(gradient, E, dtype)
    large, middle, small = (1.0 + bend * h * h for h in steps)
    assert large == pytest.approx(1.1)
    assert step.size == steps[1]
    assert step.error == pytest.approx((middle - small) / middle, rel=1e-3)


# What a reader is told.


class Operator:
    """Remembers the vector that it was checked with."""

    def __init__(self, method: str = "double-backward", reached: Tensor | None = None, **found: Any) -> None:
        self.method = method
        self.found = ProductCheck(
            **({"mismatch": 0.0, "uncertainty": 0.0, "passed": True, "dtype": torch.float64} | found)
        )
        self.reached = reached
        self.v = torch.zeros(0)

    def reached_part(self, v: Tensor) -> Tensor:
        return v if self.reached is None else v * self.reached

    def check(self, v: Tensor) -> ProductCheck:
        self.v = v
        return self.found


TOLD: dict[str, tuple[dict[str, Any], bool, str | None]] = {
    "right": ({}, False, None),
    "below-a-percent": ({"mismatch": 0.0099}, False, None),
    "wrong": ({"mismatch": 0.3, "passed": False}, True, "differ from finite differences by 30.0%.*method='fd'"),
    "wrong-by-differences": ({"mismatch": 0.3, "passed": False, "method": "fd"}, True, r"by fd .* reported\.$"),
    "no-potential": ({"passed": False, "asymmetry": 0.25}, True, r"no potential \(vᵀJw and wᵀJv differ by 25.0%\)"),
    "inexact": ({"method": "fd", "mismatch": 0.0101}, False, "finite differences are inexact here, by 1.0%"),
    "differences-to-a-percent": ({"method": "fd", "mismatch": 0.0099}, False, None),
    "bfloat16": ({"mismatch": 0.02, "computed": torch.bfloat16}, False, "computes in bfloat16: .* 2.0% of rounding"),
    "bfloat16-to-a-percent": ({"mismatch": 0.0099, "computed": torch.bfloat16}, False, None),
    "rounding-of-single": ({"mismatch": 0.02, "computed": torch.float32}, False, None),
    "single": ({"mismatch": 0.004, "dtype": torch.float32}, False, r"float32 only \(mismatch 0.4%\)"),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_the_check_found_is_told(name: str) -> None:
    found, wrong, note = TOLD[name]
    result = check_products(Operator(**found), E)  # type: ignore[arg-type]
    assert result.wrong is wrong
    assert (result.note is None) is (note is None)
    assert re.search(note or "", result.note or "")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_mode_and_a_random_vector_are_checked_together_on_the_same_side(sign: float) -> None:
    random = sign * torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    operator = Operator()
    check_products(operator, 7.0 * E, random)  # type: ignore[arg-type]
    expected = E.numpy() + np.array([3.0, 1.0, 0.0, 0.0, 0.0]) / np.sqrt(10.0)
    assert np.allclose(operator.v.numpy(), expected, rtol=1e-12)


def test_alone_the_mode_is_what_is_checked() -> None:
    operator = Operator()
    check_products(operator, 7.0 * E)  # type: ignore[arg-type]
    assert torch.equal(operator.v, 7.0 * E)


def test_what_no_gradient_reaches_is_left_out_of_the_random_vector() -> None:
    reached = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    operator = Operator(reached=reached)
    check_products(operator, E, torch.ones(N, dtype=torch.float64))  # type: ignore[arg-type]
    assert np.allclose((operator.v - E).numpy(), reached.numpy() / np.sqrt(2.0))
    operator = Operator(reached=torch.zeros(N, dtype=torch.float64))
    check_products(operator, E, torch.ones(N, dtype=torch.float64))  # type: ignore[arg-type]
    assert torch.equal(operator.v, E)


# The operator itself.


class Halves(nn.Module):
    """Uses its second parameter only where the batch says so, and holds a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(2))
        self.two = nn.Parameter(torch.ones(2))
        self.held = torch.ones(3)


def half_loss(module: Any, batch: Any) -> Tensor:
    SEEN.append(weakref.ref(module.held))
    used = module.one.square().sum() * module.held.sum()
    return used + module.two.square().sum() if bool(batch.any()) else used


SEEN: list[Any] = []


@pytest.mark.parametrize(("batches", "unused"), [([0, 0], 0.5), ([0, 1], 0.0), ([1, 0], 0.0), ([1, 1], 0.0)])
def test_a_parameter_is_used_if_some_batch_uses_it(batches: list[int], unused: float) -> None:
    operator = HessianOperator(Halves(), half_loss, [torch.full((2,), float(b)) for b in batches])
    operator.matvec(torch.ones(4))
    assert operator.unused == unused
    reached = operator.reached_part(torch.ones(4))
    assert reached.tolist() == [1.0, 1.0, 1.0 - 2 * unused, 1.0 - 2 * unused]


def test_what_an_evaluation_held_is_free_after_the_sandbox() -> None:
    operator = HessianOperator(Halves(), half_loss, [torch.ones(2)])
    SEEN.clear()
    with operator:
        operator.matvec(torch.ones(4))
        operator.matvec(torch.ones(4))
    gc.collect()
    assert len(SEEN) == 1  # the graph was kept
    assert SEEN[0]() is None
