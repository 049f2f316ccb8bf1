"""Evaluations in double precision of code that converts to less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Widened(TorchFunctionMode):
    """Makes every conversion to a shorter floating-point type one to double precision.

    A ``logits.float()`` in the loss would round away the small steps of the self-check.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        return func(*map(_widen, args), **{key: _widen(value) for key, value in (kwargs or {}).items()})


def _widen(argument: Any) -> Any:
    short = isinstance(argument, torch.dtype) and argument.is_floating_point
    return torch.float64 if short else argument
