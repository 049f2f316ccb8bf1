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
    """

    mismatch: float
    uncertainty: float
    passed: bool
    dtype: torch.dtype


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


def check_product(
    product: Tensor, gradient: Callable[..., Tensor], direction: Tensor, *, rounding: float, error: float
) -> ProductCheck:
    """Compare a product with central finite differences.

    In double precision where the loss can be evaluated in it (four gradients), else in float32, where a mismatch that
    the kinks of the loss explain is accepted (six gradients).

    Args:
        product: The Hessian times ``direction``, ``(n,)``.
        gradient: Gradient at a displacement, which takes ``dtype`` as the precision to evaluate in.
        direction: Unit vector, ``(n,)``.
        rounding: Relative rounding of the product.
        error: Relative error that the product itself has from finite differences.
    """
    dtype = torch.float64
    sizes = [0.0]  # of the gradients

    def noted(shift: Tensor, **settings: torch.dtype) -> Tensor:
        found = gradient(shift, **settings)
        sizes.append(float(torch.linalg.vector_norm(found)))
        return found

    steps = _DOUBLE_STEPS
    try:
        differences = central_differences(partial(noted, dtype=dtype), direction.to(dtype), steps)
    except (RuntimeError, TypeError, ValueError):  # a dtype written down in the loss, or a device without doubles
        dtype = torch.float32
        steps = _FLOAT_STEPS
        differences = central_differences(noted, direction, steps)
    # Both are rounding of the gradients where there is no curvature, and a ratio of them means nothing.
    floors = [8 * torch.finfo(dtype).eps * max(sizes) / h for h in steps]
    mismatch = min(_relative_distance(d, product, floor) for d, floor in zip(differences, floors, strict=True))
    uncertainty = min(_relative_distance(a, b) for a, b in pairwise(differences))
    accepted = max(_SMOOTH_TOLERANCE, rounding, min(_KINKED_TOLERANCE, 3 * max(uncertainty, error)))
    return ProductCheck(mismatch, uncertainty, mismatch <= accepted, dtype)


def _relative_distance(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """Return ‖a − b‖ over the greater length; 0 if neither is above the floor."""
    a = a.double()
    b = b.double()
    scale = max(float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b)))
    return float(torch.linalg.vector_norm(a - b)) / scale if scale > floor else 0.0
