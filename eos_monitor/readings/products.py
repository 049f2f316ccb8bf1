"""Whether the products with the Hessian can be relied on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eos_monitor.curvature.hessian import HessianOperator
from eos_monitor.curvature.norms import dot, length_of


@dataclass(frozen=True)
class CheckedProducts:
    """What the check of a run's products found.

    Attributes:
        wrong: Whether no edge may be reported from them.
        note: What a reader should know of it; None for nothing.
    """

    wrong: bool
    note: str | None = None


def check_products(operator: HessianOperator, v: Tensor, random: Tensor | None = None) -> CheckedProducts:
    """Compare the product with ``v``, ``(n,)``, with finite differences.

    Where λ_max is 0 the product with its mode is rounding, and so is the difference. With a ``random`` vector of the
    same length added there is something to compare; where λ_max is not 0, the mode's part prevails all the same.
    """
    if random is not None:
        # Not along what the loss sees but no gradient reaches (layers before a detach): training leaves that alone.
        random = operator.reached_part(random)
        length = length_of(random)
        # On the same side, or the two would cancel where there are few parameters.
        side = -1.0 if float(dot(v, random)) < 0.0 else 1.0
        v = v / length_of(v) + (side / length) * random if length > 0.0 else v
    check = operator.check(v)
    if check.asymmetry:
        return CheckedProducts(
            True,
            f"what the loss gives as its gradient has no potential (vᵀJw and wᵀJv differ by {check.asymmetry:.1%}), as "
            "with stop-gradients, targets from the net itself, gradient reversal and straight-through estimators: "
            "there is no Hessian, and no edge is reported. batch_sharpness(method='fd') looks along this field "
            "itself and still holds, and so does what the verdict takes from losses and updates.",
        )
    if not check.passed:
        return CheckedProducts(
            True,
            f"Hessian-vector products by {operator.method} differ from finite differences by "
            f"{check.mismatch:.1%}: something in this module cannot be differentiated twice (weight_norm, "
            "once_differentiable and custom backwards are known to). No edge is reported."
            + (" method='fd' does without second derivatives." if operator.method != "fd" else ""),
        )
    if operator.method == "fd" and check.mismatch > 1e-2:
        return CheckedProducts(
            False, f"finite differences are inexact here, by {check.mismatch:.1%} (kinks, or rounding)"
        )
    if check.mismatch > 1e-2 and torch.finfo(check.computed).bits < 32:
        kind = str(check.computed).removeprefix("torch.")
        return CheckedProducts(False, f"the loss computes in {kind}: products carry {check.mismatch:.1%} of rounding")
    if check.dtype != torch.float64:
        return CheckedProducts(
            False,
            f"products checked in float32 only (mismatch {check.mismatch:.1%}), because the loss refuses float64",
        )
    return CheckedProducts(False)
