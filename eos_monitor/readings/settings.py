"""What readings are taken on, and how they are solved: settings that every monitor shares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

from eos_monitor.curvature.hessian import METHODS

_P = ParamSpec("_P")
_R = TypeVar("_R")

KINDS = ("fixed", "batch")


@dataclass(frozen=True)
class Probe:
    """The data that readings are taken on.

    Attributes:
        batches: ``"fixed"`` (copies of the first training batches, whole, on the CPU), ``"batch"`` (the batch of the
            step that is measured), or an iterable of batches.
        samples: Samples to collect for ``"fixed"``, ≥ 1, in whole batches; of an iterable without a length, too, which
            may have no end. None chooses: 256 of an iterable, and where ``every_n_steps`` is given or a step sees all
            the data; else one batch first, and once, after the first readings, as many more (256 samples at most) as
            leave room for 30 readings in the run.
        full_batch: Whether the probe is all the data that a step uses. None finds out: under Lightning an epoch is then
            one step on the probe; in a plain loop it is not.
        batch_size_fn: Samples in a batch; by default the first dimension of its first tensor.
        max_pause: Seconds that a reading may hold the run, > 0, up to one product and the check of the first reading: a
            solve that is not done by then is marked as not converged, and goes on at the next reading. None for 60
            steps' time or 2 s, whichever is longer, and for no limit where ``every_n_steps`` is given.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If ``batches`` is neither a kind nor an iterable.

    Example:
        >>> Probe(samples=64)
        Probe(batches='fixed', samples=64, full_batch=None, batch_size_fn=None, max_pause=None)
    """

    batches: str | Iterable[Any] = "fixed"
    samples: int | None = None
    full_batch: bool | None = None
    batch_size_fn: Callable[[Any], int] | None = None
    max_pause: float | None = None

    def __post_init__(self) -> None:
        wanted = f"Expected `probe` to be one of {KINDS} or an iterable of batches, got"
        if isinstance(self.batches, str):
            if self.batches not in KINDS:
                raise ValueError(f"{wanted} {self.batches!r}.")
        elif not callable(getattr(self.batches, "__iter__", None)):
            raise TypeError(f"{wanted} {type(self.batches).__name__}.")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"Expected `samples` >= 1 or None, got {self.samples}.")
        if self.max_pause is not None and not self.max_pause > 0.0:
            raise ValueError(f"Expected `max_pause` > 0 or None, got {self.max_pause}.")

    @classmethod
    def of(cls, probe: Probe | str | Iterable[Any]) -> Probe:
        """Return what was passed as ``probe=``: a kind or batches stand for a probe of them."""
        return probe if isinstance(probe, Probe) else cls(probe)


@dataclass(frozen=True)
class Solver:
    """How readings are solved.

    Attributes:
        k: Number of eigenvalues, ≥ 1, or ``"edge"`` for all of at least 0.75 (at most 16).
        rtol: Relative residual of a reading, in (0, 1); a cold solve is tightened to at most 1e-4.
        max_matvecs: Bound on the Hessian-vector products of one solve.
        method: ``"auto"``, ``"double-backward"`` or ``"fd"``, see :class:`HessianOperator`.
        raw_sharpness: Solve for λ_max(H) too where it does not follow from the edge ratio, at the cost of a second
            solve.
        seed: Seed of start vectors, probes and jitter.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> Solver(k=3, rtol=1e-3).max_matvecs
        64
    """

    k: int | Literal["edge"] = 1
    rtol: float = 1e-2
    max_matvecs: int = 64
    method: Literal["auto", "double-backward", "fd"] = "auto"
    raw_sharpness: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = 1 if self.k == "edge" else self.k
        if not isinstance(least, int) or least < 1 or self.max_matvecs < least:
            raise ValueError(f"Expected 1 <= `k` <= `max_matvecs`, got {self.k} and {self.max_matvecs}.")
        if not 0.0 < self.rtol < 1.0:
            raise ValueError(f"Expected 0 < `rtol` < 1, got {self.rtol}.")
        if self.method not in METHODS:
            raise ValueError(f"Expected `method` to be one of {METHODS}, got {self.method!r}.")


# argument of earlier versions -> where it went
_MOVED = {
    "probe_samples": "probe=Probe(samples=...)",
    "full_batch": "probe=Probe(full_batch=...)",
    "batch_size_fn": "probe=Probe(batch_size_fn=...)",
    "k": "solver=Solver(k=...)",
    "rtol": "solver=Solver(rtol=...)",
    "max_matvecs": "solver=Solver(max_matvecs=...)",
    "method": "solver=Solver(method=...)",
    "raw_sharpness": "solver=Solver(raw_sharpness=...)",
    "seed": "solver=Solver(seed=...)",
    "actions": "a callback of its own, StabilityActions(...)",
    "dry_run": "StabilityActions(dry_run=...)",
    "edge_target": "StabilityActions(edge_target=...)",
    "lr_floor": "StabilityActions(lr_floor=...)",
    "action_cooldown": "StabilityActions(cooldown=...)",
    "snapshot_every": "StabilityActions(snapshot_every=...)",
}


def names_moved_arguments(init: Callable[_P, _R], *, moved: Mapping[str, str] = _MOVED) -> Callable[_P, _R]:
    """Let a constructor that is given a setting by a name of its own say which object that setting belongs to."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name in moved and name not in known:
                raise TypeError(f"Expected no argument {name!r}, got one: it is part of {moved[name]} now.")
        return init(*args, **kwargs)

    return checked
