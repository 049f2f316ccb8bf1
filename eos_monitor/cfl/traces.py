"""What is noted of tensors on their way from a layer's output to its activation."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from eos_monitor.cfl.activations import Activation
from eos_monitor.cfl.calls import ActivationCall, BatchNormCall
from eos_monitor.cfl.chains import Chain


@dataclass(frozen=True, eq=False)
class Passage:
    """A layer's output within a tensor, changed by what ``via`` says; ``index`` is the number of its call."""

    index: int
    via: tuple[str, ...]
    before: Tensor | None  # the tensor as it would be with the layer's previous parameters


@dataclass(frozen=True, eq=False)
class Trace:
    """What is known of a tensor that depends on a layer: outputs that it holds, and the function that it is of one."""

    passages: tuple[Passage, ...] = ()
    chain: Chain | None = None


@dataclass(frozen=True, eq=False)
class Application:
    """An activation that is about to run on what layers put out."""

    passages: tuple[Passage, ...]
    activation: Activation | None
    instead_of: frozenset[int]  # the activations that it is made of
    obstacle: str = ""


@dataclass(eq=False)
class Outcome:
    """What became of a layer's output: the activations that ran on it, or what it went into instead."""

    applied: dict[int, ActivationCall] = field(default_factory=dict)
    batch_norm: BatchNormCall | None = None
    obstacle: str = ""
    ends: list[str] = field(default_factory=list)

    def admits(self, via: tuple[str, ...], instead_of: frozenset[int]) -> bool:
        """Whether an activation at the end of ``via`` counts, in the place of those that it is made of."""
        # A residual stream runs through every later activation too: the nearest is the layer's own.
        others = [call for number, call in self.applied.items() if number not in instead_of]
        return all(len(via) <= len(call.via) for call in others)

    def add(self, number: int, call: ActivationCall, instead_of: frozenset[int]) -> None:
        """Add an activation by its number."""
        kept = {n: c for n, c in self.applied.items() if n not in instead_of and len(c.via) == len(call.via)}
        self.applied = {**kept, number: call}

    @property
    def activation(self) -> ActivationCall | None:
        """The activation that follows the layer; None unless it is one."""
        return next(iter(self.applied.values())) if len(self.applied) == 1 and not self.obstacle else None

    @property
    def reason(self) -> str:
        """Why there is none, in words."""
        if self.obstacle or self.activation is not None:
            return self.obstacle
        if self.applied:
            names = ", ".join(call.activation.name for call in self.applied.values())
            return f"several activations read its output ({names})"
        ends = ", ".join(dict.fromkeys(self.ends))
        return f"no elementwise activation follows ({f'but {ends}' if ends else 'its output is not seen again'})"
