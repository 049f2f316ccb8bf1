"""Elementwise functions put together from several calls, such as x · sigmoid(βx)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from eos_monitor.cfl.activations import Activation, is_activation, swish
from eos_monitor.cfl.partition import Elementwise

# Not activations by themselves, but what makes another one of an activation: relu(z).square().
FOLLOWERS = ("square", "pow", "abs", "exp", "log1p", "expm1", "sqrt", "log")
ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "rdiv", "neg")

_Kind = Literal["scaled", "affine", "curved", "sigmoid", "swish", "activation"]


@dataclass(frozen=True, eq=False)
class Chain:
    """A tensor as an elementwise function of another.

    Attributes:
        source: The other tensor.
        version: Its version when the chain began; with another one, its values have been overwritten.
        function: The function.
        kind: ``"scaled"`` βz, ``"affine"``, ``"sigmoid"`` σ(βz), ``"swish"`` zσ(βz), ``"activation"`` with one of
            torch's activations in it, ``"curved"`` anything else.
        beta: β where the kind has one.
        composed: Whether the last call made an activation out of several.
        applied: Numbers of the activations that it is made of.
    """

    source: Tensor
    version: int
    function: Elementwise
    kind: _Kind
    beta: float | Tensor = 1.0
    composed: bool = False
    applied: frozenset[int] = frozenset()

    @staticmethod
    def identity(source: Tensor) -> Chain:
        """Begin a chain."""
        return Chain(source, source._version, lambda z: z, "scaled")

    @property
    def straight(self) -> bool:
        """Whether it is linear."""
        return self.kind in ("scaled", "affine")

    @property
    def has_activation(self) -> bool:
        """Whether one of torch's activations is in it."""
        return self.kind in ("sigmoid", "swish", "activation")

    def activation(self) -> Activation:
        """Return the function as one activation."""
        return swish(self.beta) if self.kind == "swish" else Activation("composition", self.function)


@dataclass(frozen=True)
class _Hole:
    """Place of an operand in a call that is made again, as a function of the chain's source."""

    function: Elementwise


def extend(name: str, func: Any, args: Any, kwargs: Mapping[str, Any], chains: Mapping[int, Chain]) -> Chain | None:
    """Return the result of an elementwise call as a function of what its operands are functions of.

    Args:
        name: Name of the function: an activation, or one of FOLLOWERS and ARITHMETIC.
        func: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        chains: Id of an operand -> its chain; the other tensors are constants.

    Returns:
        None if the operands are functions of different tensors.
    """
    slots = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    parts = [chains[id(t)] for t in slots if id(t) in chains]
    constants = [t for t in slots if id(t) not in chains]
    if not parts or any(part.source is not parts[0].source for part in parts):
        return None
    # A bias of one value per channel moves the borders of each by another amount: it belongs before the function.
    if name not in ("mul", "div", "prelu") and any(t.numel() > 1 for t in constants):
        return None
    # The closure must not keep the operands themselves alive.
    held_args = [_Hole(chains[id(a)].function) if id(a) in chains else a for a in args]
    held_kwargs = {key: _Hole(chains[id(a)].function) if id(a) in chains else a for key, a in kwargs.items()}
    held_kwargs.pop("inplace", None)

    def function(z: Tensor) -> Tensor:
        def fill(a: Any) -> Any:
            return a.function(z) if isinstance(a, _Hole) else a

        result: Tensor = func(*map(fill, held_args), **{key: fill(a) for key, a in held_kwargs.items()})
        return result

    kind, beta = _classify(name, args, parts)
    made = (is_activation(name) or name in FOLLOWERS) and parts[0].has_activation
    multiplied = len(parts) > 1 and name in ("mul", "div", "rdiv") and not all(part.straight for part in parts)
    applied = frozenset[int]().union(*(part.applied for part in parts))
    return Chain(parts[0].source, parts[0].version, function, kind, beta, made or multiplied, applied)


def _classify(name: str, args: Any, parts: list[Chain]) -> tuple[_Kind, float | Tensor]:
    first = parts[0]
    if is_activation(name):
        sigmoid = name in ("sigmoid", "special_expit") and first.kind == "scaled"
        return ("sigmoid", first.beta) if sigmoid else ("activation", 1.0)
    if len(parts) > 1:
        return _classify_pair(name, parts)
    if name in FOLLOWERS or name == "rdiv":
        return ("activation" if first.has_activation else "curved"), 1.0
    if first.kind == "scaled" and name in ("mul", "div", "neg"):
        return _rescaled(name, args, first)
    if first.straight:
        return "affine", 1.0
    return ("activation" if first.has_activation else "curved"), 1.0


def _rescaled(name: str, args: Any, part: Chain) -> tuple[_Kind, float | Tensor]:
    if name == "neg":
        return "scaled", -part.beta
    constant = args[1] if len(args) > 1 and not isinstance(args[1], str) else None
    if name == "mul" and isinstance(args[0], Tensor) and isinstance(constant, Tensor):
        # Either of the two may be the constant.
        constant = args[0] if args[0] is not part.source and args[1] is part.source else constant
    if isinstance(constant, Tensor):
        constant = constant.detach()
    elif not isinstance(constant, (int, float)):
        return "affine", 1.0
    return "scaled", part.beta * constant if name == "mul" else part.beta / constant


def _classify_pair(name: str, parts: list[Chain]) -> tuple[_Kind, float | Tensor]:
    kinds = {part.kind: part for part in parts}
    if name == "mul" and set(kinds) == {"scaled", "sigmoid"}:
        factor = kinds["scaled"].beta
        if not isinstance(factor, Tensor) and factor == 1.0:
            return "swish", kinds["sigmoid"].beta
    if name in ("add", "sub", "rsub") and all(part.straight for part in parts):
        return "affine", 1.0
    nonlinear = name in ("mul", "div", "rdiv") and not all(part.straight for part in parts)
    return ("activation" if nonlinear or any(part.has_activation for part in parts) else "curved"), 1.0
