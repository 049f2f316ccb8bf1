"""Evaluations in double precision of code that converts to less, and what precision it has otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Draws whose numbers depend on the precision that they are drawn in; dropout's do not.
_IN_PLACE = ("normal_", "uniform_")
_DRAWS = ("randn_like", "rand_like", "randn", "rand", "normal", *_IN_PLACE)


class Widened(TorchFunctionMode):
    """Mode in which every conversion to a shorter floating-point type is one to double precision.

    A ``logits.float()`` in the loss would round away the small steps of the self-check. Random numbers are those of the
    usual precision, widened: a loss with other noise is another loss.

    Args:
        usual: Precision that the loss is evaluated in otherwise.
    """

    def __init__(self, usual: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._usual = usual

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        if name in _DRAWS:
            drawn = func(*map(self._narrow, args), **{key: self._narrow(value) for key, value in kwargs.items()})
            return args[0].copy_(drawn) if name in _IN_PLACE else drawn.double()
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        return func(*map(_widen, args), **{key: _widen(value) for key, value in kwargs.items()})

    def _narrow(self, argument: Any) -> Any:
        if argument is torch.float64:  # of a tensor, most likely, that is wide here only
            return self._usual
        wide = isinstance(argument, Tensor) and argument.dtype == torch.float64
        return argument.to(self._usual, copy=True) if wide else argument


def _widen(argument: Any) -> Any:
    short = isinstance(argument, torch.dtype) and argument.is_floating_point
    return torch.float64 if short else argument


class Precisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that notes the floating-point types that operators return, those inside autocast among them.

    Attributes:
        seen: The types.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    @property
    def shortest(self) -> torch.dtype:
        """The least precise one."""
        return max(self.seen, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()}
        return result


class PrecisionWatch:
    """Notes the least precision that a loss computes in, in the first evaluation that it is put around.

    Attributes:
        shortest: That precision; None before.
    """

    def __init__(self) -> None:
        self.shortest: torch.dtype | None = None

    @contextmanager
    def once(self) -> Iterator[None]:
        """Watch an evaluation, if none was watched before."""
        if self.shortest is not None:
            yield
            return
        with Precisions() as precisions:
            yield
        self.shortest = precisions.shortest

    def of(self, evaluate: Callable[[], object]) -> torch.dtype:
        """Return what was seen; before anything was, in an evaluation for its sake."""
        if self.shortest is None:
            with self.once():
                evaluate()
        assert self.shortest is not None
        return self.shortest
