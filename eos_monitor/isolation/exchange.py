"""No exchange between processes while one of them evaluates a loss alone: it would wait for the others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional")


class ExchangeError(RuntimeError):
    """A loss that one process evaluates alone needs the others."""


def without_exchange() -> AbstractContextManager[Any]:
    """Return a context in which collective calls raise :class:`ExchangeError` in place of being made.

    With one process it does nothing: there they are harmless.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    refuse = several and torch.distributed.get_world_size() > 1
    return _Refusal() if refuse else nullcontext()  # type: ignore[no-untyped-call]


class _Refusal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every collective call goes through torch's dispatcher, whatever function made it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _NAMESPACES:
            raise ExchangeError(
                f"Expected a loss that one process can evaluate alone, got one that exchanges between processes "
                f"({func.namespace}.{func.overloadpacket.__name__}). Pass a loss_fn (or define curvature_loss) without."
            )
        return func(*args, **(kwargs or {}))
