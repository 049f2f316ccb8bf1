"""The edge ratio as gradient clipping leaves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from eos_monitor.isolation.twin import trained_parameters
from eos_monitor.limits.neighbours import clipped_ratio
from eos_monitor.verdicts.steps import kind_of


def clipped_edge_ratio(trainer: Any, optimizers: Sequence[Any], edge_ratio: float | None) -> float | None:
    """Return the edge ratio at the learning rate that clipping by the Trainer makes of the present one.

    To be asked before the optimizer's step, when the gradients are there and not clipped yet. None without clipping by
    the norm, and for optimizers with a second moment, in which a constant factor cancels.

    Args:
        trainer: The Trainer.
        optimizers: Those that are measured.
        edge_ratio: Edge ratio without clipping.
    """
    limit = trainer.gradient_clip_val
    by = trainer.gradient_clip_algorithm
    # Lightning clips by the norm unless told otherwise; by value there is no common factor.
    if edge_ratio is None or not limit or (by is not None and getattr(by, "value", by) != "norm"):
        return None
    if kind_of(optimizers)["family"] == "adam":
        return None
    gradients = [p.grad for p in trained_parameters(optimizers) if p.grad is not None]
    if not gradients:
        return None
    norms = torch.stack([torch.linalg.vector_norm(g.detach()).double().to(gradients[0].device) for g in gradients])
    norm = float(torch.linalg.vector_norm(norms))
    return clipped_ratio(edge_ratio, clip_norm=float(limit), grad_norm=norm) if math.isfinite(norm) else None
