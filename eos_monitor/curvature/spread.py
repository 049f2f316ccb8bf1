"""How much a product varies over the parts of a probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eos_monitor.isolation.batches import split_batch

_DEVIATION = 0.1  # of the whole; sums over samples are off by the number of slices, 2 and more

_SMALLEST_SLICE = 4  # batch statistics of fewer samples say nothing of those of the whole


@dataclass(frozen=True)
class Spread:
    """Mean and variance of a product over the parts of a probe.

    Attributes:
        parts: Number of parts.
        mean: Mean of ``uᵀ H_b u`` over all samples, so that of the whole where the loss is a mean over samples.
        along: Variance of ``uᵀ H_b u``.
        across: Variance of the rest of ``H_b u``, summed over its directions.
        whole: ``uᵀ H u`` of the whole batches.
    """

    parts: int
    mean: float
    along: float
    across: float
    whole: float

    @property
    def reproduces(self) -> bool:
        """Whether the parts' mean is that of the whole, but for what chance (dropout, batch statistics) explains.

        Sums over samples, or losses that relate samples to one another, are off by factors.
        """
        allowed = _DEVIATION * abs(self.whole) + 3 * math.sqrt(max(0.0, self.along) / self.parts)
        return abs(self.mean - self.whole) <= allowed


class Moments:
    """Sums over parts that can be added up over processes.

    Args:
        u: Unit vector, ``(n,)``.
        device: Where the sums are kept.

    Attributes:
        total: The sums: Σ p_b, Σ w_b uᵀp_b, Σ w_b, Σ uᵀp_b, Σ (uᵀp_b)², Σ ‖p_b‖², number of parts, whether there are
            too few; ``(n + 7,)``, in double precision.
    """

    def __init__(self, u: Tensor, device: torch.device) -> None:
        self.total = torch.zeros(len(u) + 7, dtype=torch.float64, device=device)
        self._u = u.double()

    def add(self, product: Tensor, weight: float) -> None:
        """Take in the product of a part, ``(n,)``, that holds ``weight`` samples."""
        product = product.double()
        along = float(product @ self._u)
        self.total[:-7] += product
        squares = [along**2, float(product @ product)]
        self.total[-7:] += self.total.new_tensor([weight * along, weight, along, *squares, 1.0, 0.0])

    def give_up(self) -> None:
        """Say that there are too few parts here."""
        self.total[-1] = 1.0


def couples_samples(module: nn.Module) -> bool:
    """Whether some layer normalizes by statistics of the batch, so that a part of a batch has another loss."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        for m in module.modules()
    )


def parts_of(batches: Sequence[Any], least: int, *, coupled: bool) -> tuple[list[Any], bool, bool]:
    """Return the batches, or slices of them where they are fewer than ``least``; whether sliced, and whether all are.

    A batch that cannot be sliced is left out. Where batch statistics couple the samples, slices have four at least.
    """
    slices = -(-least // len(batches))
    smallest = _SMALLEST_SLICE if coupled else 1
    split = [split_batch(batch, slices, smallest) if slices > 1 else [batch] for batch in batches]
    return [part for pieces in split for part in pieces or ()], slices > 1, all(pieces is not None for pieces in split)


def spread_of(total: Tensor, whole: float | None) -> Spread | None:
    """Return the spread that sums over all parts say; None if some process has too few."""
    weighted, weight, along, along2, length2, count, missing = total[-7:].tolist()
    if missing:
        return None
    variance = (along2 - along**2 / count) / (count - 1)
    all_directions = (length2 - float(total[:-7] @ total[:-7]) / count) / (count - 1)
    mean = weighted / weight
    across = max(0.0, all_directions - variance)
    return Spread(int(count), mean, variance, across, mean if whole is None else whole)
