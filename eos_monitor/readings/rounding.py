"""What the rounding of the products leaves of a reading's accuracy.

A loss may compute in less precision than its parameters have (autocast inside it, a base in bfloat16, the flags of
matrix products), and coordinates that bear little magnify what is rounded. No type shows how much: it is measured.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from eos_monitor.curvature.hessian import HessianOperator
from eos_monitor.curvature.norms import length_of
from eos_monitor.curvature.precision import PrecisionWatch
from eos_monitor.readings.edge_solver import AUDIT_EVERY, EdgeOperator, Solution

# Two products and that of their sum differ by this share of the greatest eigenvalue: in float32 by some 1e-6, inside
# autocast by 3e-4 (float16) and 3e-3 to 1e-2 (bfloat16) on MLPs, a CNN and a transformer under SGD and AdamW.
_NOTICEABLE = 1e-5
# Residuals along those runs ended at 0.04 to 0.38 of that difference.
_REACHED = 0.5
_MOST = 0.1  # a residual above which an eigenvalue is none
# Products in double precision differed from those runs' by up to four units of rounding along the mode.
_UNITS = 4


class Rounding:
    """Rounding of the products of a run. It is looked at once where a loss may round, and renewed at every tenth solve.

    Attributes:
        error: RMS error of an eigenvalue that comes from it, relative.
        note: What a reader should know of it, in words; None for nothing.
    """

    def __init__(self) -> None:
        self.error = 0.0
        self.note: str | None = None
        self._watch: PrecisionWatch | None = None
        self._seen: weakref.ref[EdgeOperator] | None = None  # an operator holds vectors, and the module
        self._difference: float | None = None  # relative; None if it is not known
        self._short = False
        self._solves = 0

    def follow(self, hessian: HessianOperator) -> None:
        """Let an operator know the precision that an earlier one was seen to compute in."""
        if self._watch is not None:
            hessian.watch = self._watch
        self._watch = hessian.watch

    def reachable(self, operator: EdgeOperator) -> float:
        """Return the relative residual that a solve can get to. Three products where that is measured."""
        if self._seen is None or operator is not self._seen():
            self._seen = weakref.ref(operator)
            due = self._difference is None or (self._is_noticeable and self._solves % AUDIT_EVERY == 0)
            # Finite differences have an error of their own, which their step knows.
            if due and operator.hessian.method != "fd":
                self._short = operator.hessian.is_short()
                rounds = self._short or operator.device.type != "cpu"  # accelerators have flags that shorten float32
                self._difference = nonlinearity(operator) if rounds else 0.0
            self._solves += 1
        return self.known(operator)

    def known(self, operator: EdgeOperator) -> float:
        """Return it without measuring."""
        return min(_MOST, _REACHED * (self._difference or 0.0))

    def weigh(self, solution: Solution) -> None:
        """Compare the top pair with a product in double precision, where the products are rounded noticeably."""
        if self._is_noticeable and solution.top != 0.0 and (self.note is None or self._solves % AUDIT_EVERY == 1):
            self._weigh(solution)

    @property
    def _is_noticeable(self) -> bool:
        # What is rounded may be a constant, such as a frozen base gives, and the products linear all the same.
        return self._short or (self._difference or 0.0) > _NOTICEABLE

    def _weigh(self, solution: Solution) -> None:
        theta = solution.top
        mode = solution.spectrum.eigenvectors[:, 0].double()
        difference = self._difference or 0.0
        kind = solution.operator.hessian.precision()
        try:
            # Some eigenvalue of the exact operator lies within this distance.
            away = length_of(solution.operator.exact_product(mode) - theta * mode) / abs(theta)
            how = f"in double precision the product along the mode differs by {away:.2g}"
        except (RuntimeError, TypeError, ValueError):  # a dtype written down in the loss, or a device without doubles
            away = _UNITS * torch.finfo(kind).eps
            how = f"the loss refuses double precision, and four units of rounding ({away:.2g}) are taken for it"
        # One product is one draw: the next readings' are others, as far apart as two products are.
        self.error = math.hypot(away, difference)
        self.note = (
            f"products are rounded (the loss computes in {str(kind).removeprefix('torch.')}): no residual below "
            f"{_REACHED * difference:.0e} of the edge ratio is asked for; {how}, and `error` contains it"
        )


def nonlinearity(operator: EdgeOperator) -> float:
    """Return ``‖A(v + w) − Av − Aw‖`` with w along Av, relative to ``‖Aw‖`` and for unit vectors v and w."""
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(0), device="cpu").to(
        operator.device, operator.dtype
    )
    v = _unit(v if operator.mask is None else v * operator.mask)
    along = operator.matvec(v)
    w = _unit(along)
    across = operator.matvec(w)
    size = length_of(across)
    return length_of(operator.matvec(v + w) - along - across) / size if size else 0.0


def _unit(v: Tensor) -> Tensor:
    length = length_of(v)
    return v / length if length else v
