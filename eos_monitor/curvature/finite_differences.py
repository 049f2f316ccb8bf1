"""Central finite differences of a gradient, as products with the Hessian and as a check of such products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

# Steps of the self-check along a unit vector. In double precision they are so small that hardly any kink (ReLU,
# max-pooling) lies within reach, which is what makes the comparison sharp; in float32 rounding forbids that.
_DOUBLE_STEPS: Sequence[float] = (1e-7, 1e-6)
_FLOAT_STEPS: Sequence[float] = (1e-4, 1e-3, 1e-2)
# Sizes that a calibration chooses from.
_CALIBRATION = {torch.float32: (1e-2, 1e-3, 1e-4), torch.float64: (1e-4, 1e-5, 1e-6)}
# Measured, whole vector: right products differ by < 1e-4 on smooth nets and up to 0.07 where a float32 step crosses
# kinks; silently wrong ones (weight_norm, once_differentiable, detached saves) by 0.012 to 0.7 at every step.
_SMOOTH_TOLERANCE = 1e-2
_KINKED_TOLERANCE = 0.12
# Products of a loss that computes in bfloat16 differed by up to 2.1 % on transformers that are right in double
# precision: 2.7 units of its rounding.
_ROUNDINGS = 16
# A symmetric operator gives vᵀHw = wᵀHv to the rounding of the differences, 1e-7 of their length in double precision.
_SYMMETRY_TOLERANCE = 1e-5


@dataclass(frozen=True)
class FiniteDifferenceStep:
    """Step along a unit vector, and the relative error to expect of a product with it."""

    size: float
    error: float


@dataclass(frozen=True)
class ProductCheck:
    """Comparison of one Hessian-vector product with central finite differences of the gradient.

    Attributes:
        mismatch: ``‖Hv_fd − Hv‖ / max(‖Hv_fd‖, ‖Hv‖)`` at the best of several step sizes.
        uncertainty: Least relative difference between two of the step sizes.
        passed: Whether the mismatch is explained by rounding, or by kinks that a float32 step crosses.
        dtype: Precision of the differences; float32 where the loss refuses double precision.
        computed: Least precision that the loss computes in.
        asymmetry: ``|vᵀJw − wᵀJv|`` relative to the lengths, where J is not symmetric: the gradient that the loss gives
            is then the gradient of nothing. 0 where it is symmetric, or nobody had to look.
    """

    mismatch: float
    uncertainty: float
    passed: bool
    dtype: torch.dtype
    computed: torch.dtype = torch.float32
    asymmetry: float = 0.0


def central_differences(
    gradient: Callable[[Tensor], Tensor], direction: Tensor, steps: Sequence[float]
) -> list[Tensor]:
    """Return the Hessian times a unit vector, once for each step.

    Args:
        gradient: Gradient at a displacement, both ``(n,)``.
        direction: Unit vector, ``(n,)``.
        steps: Sizes of the step.
    """
    return [(gradient(h * direction) - gradient(-h * direction)) / (2 * h) for h in steps]


def calibrated_step(
    gradient: Callable[[Tensor], Tensor], direction: Tensor, dtype: torch.dtype
) -> FiniteDifferenceStep:
    """Choose the step along a unit vector: the middle of three, or the largest if rounding rules."""
    large, middle, small = _CALIBRATION[dtype]
    at_large, at_middle, at_small = central_differences(gradient, direction, (large, middle, small))
    above = _relative_distance(at_large, at_middle)
    below = _relative_distance(at_middle, at_small)
    size = middle if above <= _SMOOTH_TOLERANCE or below <= above else large
    return FiniteDifferenceStep(size, min(above, below))


@dataclass(frozen=True)
class CheckedProduct:
    """What a check needs of an operator.

    Attributes:
        product: Its product with a direction.
        gradient: Gradient at a displacement, which takes ``dtype`` as the precision to evaluate in.
        in_double: The product with a direction, computed in double precision throughout.
        rounding: Relative rounding of the product.
        error: Relative error that the product itself has from finite differences; None if it is none of them.
        computed: Gives the least precision that the loss computes in.
    """

    product: Tensor
    gradient: Callable[..., Tensor]
    in_double: Callable[[Tensor], Tensor]
    rounding: float
    error: float | None
    computed: Callable[[], torch.dtype]


def check_product(checked: CheckedProduct, direction: Tensor) -> ProductCheck:
    """Compare a product with central finite differences.

    In double precision where the loss can be evaluated in it (four gradients), else in float32, where a mismatch that
    the kinks of the loss explain is accepted (six gradients). Where the loss computes in less precision than its
    parameters have, a mismatch that its rounding explains is accepted too, if the same product in double precision is
    right. Two more gradients tell whether what is differentiated is a gradient at all, where that is in doubt.

    Args:
        checked: The product, and what it is compared with.
        direction: Unit vector that it was taken with, ``(n,)``.
    """
    sizes = [0.0]  # of the gradients

    def noted(shift: Tensor, **settings: torch.dtype) -> Tensor:
        found = checked.gradient(shift, **settings)
        sizes.append(float(torch.linalg.vector_norm(found)))
        return found

    differences = _in_double(noted, direction)
    steps = _DOUBLE_STEPS
    dtype = torch.float64
    if differences is None:
        dtype = torch.float32
        steps = _FLOAT_STEPS
        differences = central_differences(noted, direction, steps)
    # Both are rounding of the gradients where there is no curvature, and a ratio of them means nothing.
    floors = [8 * torch.finfo(dtype).eps * max(sizes) / h for h in steps]
    mismatches = [_relative_distance(d, checked.product, floor) for d, floor in zip(differences, floors, strict=True)]
    mismatch = min(mismatches)
    uncertainty = min(_relative_distance(a, b) for a, b in pairwise(differences))
    kinks = min(_KINKED_TOLERANCE, 3 * max(uncertainty, checked.error or 0.0))
    passed = mismatch <= max(_SMOOTH_TOLERANCE, checked.rounding, kinks)
    computed = torch.float32 if passed or dtype != torch.float64 else checked.computed()
    if not passed and _SMOOTH_TOLERANCE < mismatch <= _ROUNDINGS * torch.finfo(computed).eps:
        passed = _relative_distance(differences[0], checked.in_double(direction)) <= _SMOOTH_TOLERANCE
    asymmetry = 0.0
    if not passed or checked.error is not None:
        best = mismatches.index(mismatch)
        gradient = partial(checked.gradient, dtype=dtype)
        asymmetry = _asymmetry(gradient, differences[best], checked.product, direction, steps[best])
        least = _SYMMETRY_TOLERANCE if dtype == torch.float64 else _SMOOTH_TOLERANCE
        asymmetry = asymmetry if asymmetry > max(least, 10 * uncertainty) else 0.0
    return ProductCheck(mismatch, uncertainty, passed and not asymmetry, dtype, computed, asymmetry)


def _in_double(gradient: Callable[..., Tensor], direction: Tensor) -> list[Tensor] | None:
    """Return the differences in double precision; None where the loss cannot be evaluated in it."""
    try:
        return central_differences(partial(gradient, dtype=torch.float64), direction.double(), _DOUBLE_STEPS)
    except (RuntimeError, TypeError, ValueError):  # a dtype written down in the loss, or a device without doubles
        # Left before anything else is tried: the traceback holds the tensors of an attempt that ran out of memory.
        return None


def _asymmetry(
    gradient: Callable[..., Tensor], along: Tensor, product: Tensor, direction: Tensor, step: float
) -> float:
    """Return ``|vᵀJw − wᵀJv| / (‖Jv‖‖Jw‖)^½`` of the Jacobian J of what the loss gives as its gradient.

    Args:
        gradient: Gradient at a displacement.
        along: J v by finite differences.
        product: The product that was checked.
        direction: v, a unit vector.
        step: Size of the step.
    """
    v = direction.to(along.dtype)
    w = along - product.to(along.dtype)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(v.shape, generator=generator, dtype=torch.float64, device="cpu").to(v.device, v.dtype)
    # Where the product is none of J's the difference points to why; else any direction will do.
    w = random if float(w.norm()) <= _SMOOTH_TOLERANCE * float(along.norm()) else w
    w = w - (w @ v) * v
    if len(w) == 1 or not float(w.norm()):
        return 0.0
    w = w / w.norm()
    (across,) = central_differences(gradient, w, (step,))
    scale = float(along.norm()) * float(across.norm())
    return float((v @ across - w @ along).abs()) / scale**0.5 if scale else 0.0


def _relative_distance(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """Return ‖a − b‖ over the greater length; 0 if neither is above the floor."""
    a = a.double()
    b = b.double()
    scale = max(float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b)))
    return float(torch.linalg.vector_norm(a - b)) / scale if scale > floor else 0.0
