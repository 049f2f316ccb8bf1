"""Whether the loss that is measured is the one that is trained: its gradient beside the one that a step takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eos_monitor.curvature.hessian import HessianOperator
from eos_monitor.isolation.sandbox import LossFn, Sandbox, check_loss
from eos_monitor.readings.guard import Guard

COMPARING = "comparing the measured loss with the trained one"
LOOSE = 0.05  # of the step's gradient, that may be left over where the batch is known to be the step's
_UNSCALED = 0.05  # relative: what LOOSE could move the factor by, so that nothing nearer to 1 is told
_SAME = 1e-3  # relative difference of two factors that are one, beside what is left over
_TELLING = 3.0  # how much more the length of the gradient has to change meanwhile
_OTHER = 0.9  # cosine beneath which the direction is another one; short of that, noise or a small term explains it
_TURNED = 2  # steps of another direction until it is told
# Dropout and the like turn both gradients at random, and lengthen both alike: of their lengths a factor of two says
# something in three steps that agree, if the measured loss draws too and nothing but the loss gave the step's gradient.
_NOISY = 0.6  # cosine
_FAR = 2.0
_NOISY_STEPS = 3
_ALIKE = 1.25  # the longest of their ratios over the shortest
_MOST_SCALED = 8  # comparisons that may have a factor
_MOST_UNCLEAR = 3  # and that say nothing


@dataclass(frozen=True)
class Agreement:
    """A step's gradient s beside the measured loss's g: ``s = factor · g + rest``, the rest orthogonal to g.

    Attributes:
        factor: ⟨s, g⟩ / ⟨g, g⟩.
        cosine: ⟨s, g⟩ / (‖s‖ ‖g‖).
        rest: ‖rest‖ / ‖s‖.
        length: ‖s‖.
    """

    factor: float
    cosine: float
    rest: float
    length: float

    @property
    def ratio(self) -> float:
        """‖s‖ / ‖g‖; 0 where they are at right angles."""
        return self.factor / self.cosine if self.cosine else 0.0

    @property
    def is_far(self) -> bool:
        """Whether the directions are alike, and the lengths are not."""
        return self.cosine > _NOISY and abs(math.log(self.ratio)) > math.log(_FAR)


def agreement(
    gradient: Tensor, params: Sequence[Tensor], gradients: Sequence[Tensor | None], share: float = 1.0
) -> Agreement | None:
    """Compare a loss's gradient with those that parameters have; None if there is nothing to compare.

    Args:
        gradient: Of the loss, flat, ``(n,)``.
        params: The parameters, in its order.
        gradients: For each what a step will take; None where it takes nothing.
        share: Factor on the loss's gradient.
    """
    sums = []
    for g, s in zip(torch.split(gradient, [p.numel() for p in params]), gradients, strict=True):
        if s is not None:  # else the optimizer passes it by: a branch that this step does not use
            dense = s.detach().to_dense() if s.is_sparse else s.detach()
            step = dense.reshape(-1).to(g.device, torch.float64)
            loss = share * g.double()
            sums.append(torch.stack([loss @ loss, loss @ step, step @ step]))
    if not sums:
        return None
    gg, gs, ss = torch.stack(sums).sum(0).tolist()
    if not (0.0 < gg < math.inf and 0.0 < ss < math.inf):
        return None
    cosine = gs / math.sqrt(gg * ss)
    return Agreement(gs / gg, cosine, math.sqrt(max(0.0, 1.0 - cosine**2)), math.sqrt(ss))


class LossMatch:
    """Finds out, once a run, whether steps take the gradient of the loss that is measured.

    A factor is told when two steps have it whose gradients differ in length by more than the factors do: clipping and
    normalization leave gradients of one length, at factors of their own. Another direction is told when two steps have
    it, of a loss and steps that are known to repeat.

    Args:
        guard: Warns of what was found.

    Attributes:
        note: What a reader of readings must know; None for nothing.
        open: Whether another step would say more.
        suspicious: Whether a step had another direction; whether it would have it again is then worth finding out.
    """

    def __init__(self, guard: Guard) -> None:
        self.note: str | None = None
        self.open = True
        self.suspicious = False
        self._guard = guard
        self._scaled: list[Agreement] = []
        self._noisy: list[float] = []
        self._turned = 0
        self._unclear = 0

    def add(
        self, found: Agreement | None, *, draws: bool = False, repeats: bool = False, tolerance: float = LOOSE
    ) -> None:
        """Take in a comparison.

        Args:
            found: The comparison.
            draws: Whether the loss draws at random, as the step's does, and nothing but the loss gave its gradient.
            repeats: Whether the step would have had the same gradient again, and nothing but the loss gave it.
            tolerance: How much of the step's gradient may be left over where it counts as the loss's.
        """
        if not self.open:
            return
        if found is not None and found.rest <= tolerance:
            self._add_aligned(found)
        elif found is not None and not repeats and found.is_far:
            self._add_noisy(found, draws)
        elif found is not None and found.cosine < _OTHER and (repeats or not self.suspicious):
            self.suspicious = True
            self._turned += repeats
            if self._turned == _TURNED:
                self._say(*_turned(found.cosine))
        else:
            self._unclear += 1
            # What does not repeat has no direction to be told of.
            self.open = self._unclear < _MOST_UNCLEAR and not self.suspicious

    def _add_aligned(self, found: Agreement) -> None:
        if abs(found.factor - 1.0) <= _UNSCALED:
            self.open = False  # it is the one
        elif any(_same_factor(found, other) for other in self._scaled):
            self._say(*_scaled(found.factor))
        self._scaled.append(found)
        self.open = self.open and len(self._scaled) < _MOST_SCALED

    def _add_noisy(self, found: Agreement, draws: bool) -> None:
        self.open = draws or not self.suspicious
        self.suspicious = True
        self._noisy += [found.ratio] if draws else []
        if len(self._noisy) < _NOISY_STEPS:
            return
        self.open = False
        if max(self._noisy) <= _ALIKE * min(self._noisy):
            note, advice = _scaled(sorted(self._noisy)[_NOISY_STEPS // 2], digits=2)
            self._say(f"{note} (about: the loss draws at random, and the gradients' lengths are compared)", advice)

    def noted(self, notes: tuple[str, ...]) -> tuple[str, ...]:
        """Return the notes of a reading with what was found."""
        return notes if self.note is None or self.note in notes else (*notes, self.note)

    def _say(self, note: str, advice: str) -> None:
        self.open = False
        self.note = note
        self._guard.warn_once("loss", f"eos_monitor: {note}. {advice}")


def measured_gradient(
    module: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    params: Sequence[Tensor],
    *,
    sandbox: Sandbox | None = None,
    batch_size_fn: Callable[[Any], int] | None = None,
) -> Tensor:
    """Return the gradient of the measured loss over batches, flat, ``(n,)``, without a trace."""
    if batch_size_fn is None and len(batches) == 1:
        batch_size_fn = lambda batch: 1  # noqa: E731 - its weight is 1 whatever its size, which need not be known
    operator = HessianOperator(module, loss_fn, batches, params=params, sandbox=sandbox, batch_size_fn=batch_size_fn)
    return operator.gradient()


def is_repeated(loss_fn: LossFn, batch: Any, sandbox: Sandbox) -> bool:
    """Whether a loss is the same whatever the generators draw."""
    with sandbox:
        losses = [check_loss(sandbox.evaluate(loss_fn, batch, {}, stream=i), constant=True) for i in range(2)]
        return bool(losses[0].detach() == losses[1].detach())


def _same_factor(one: Agreement, other: Agreement) -> bool:
    if one.factor * other.factor <= 0.0:
        return False
    unsure = one.rest + other.rest + _SAME
    return (
        abs(math.log(one.factor / other.factor)) <= unsure
        and abs(math.log(one.length / other.length)) > _TELLING * unsure
    )


def _scaled(factor: float, digits: int = 3) -> tuple[str, str]:
    """Return the note of a loss off the steps' scale, and what to do."""
    times = f"{factor:.{digits}g}"
    inverse = f"{1 / factor:.{digits}g}"
    off = f"{inverse} times the true one"
    if factor > 1.0:
        off = f"{times} times too low"
    elif factor > 0.0:
        off = f"{inverse} times too high"
    return (
        f"the loss that is measured is off the scale of the steps: they take a gradient {times} times its own, so that "
        f"the edge ratio read is {off}",
        f"Pass as loss_fn the mean loss of a step: the one measured, times {times}.",
    )


def _turned(cosine: float) -> tuple[str, str]:
    """Return the note of a loss that is not the one trained, and what to do."""
    return (
        "the loss that is measured is not the one that is trained: on the same batch and weights the steps take a "
        f"gradient of another direction (cosine {cosine:.2f})",
        "Pass as loss_fn the loss that training_step returns.",
    )
