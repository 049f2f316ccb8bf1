"""The sandbox for a module that is inside a Trainer: nothing it logs in an evaluation reaches anybody."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from eos_monitor.isolation.sandbox import LossFn, Sandbox

_LOGGING = ("log", "log_dict", "print")
_PLAIN = (str, int, float, bool, bytes, list, tuple, dict, set)


class TrainerSandbox(Sandbox):
    """Sandbox that also silences a LightningModule's logging and puts the Trainer's flags back.

    ``self.log`` in a re-run training step would register a second result under the present hook, and repeat it as a
    stale value until the epoch ends; direct calls on ``self.logger`` would reach the logger.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        seed: Seed of every evaluation.
        alone: Whether the other processes do not evaluate the same at the same time.
    """

    def __init__(self, trainer: Any, pl_module: nn.Module, *, seed: int = 0, alone: bool = False) -> None:
        super().__init__(pl_module, overrides=_silent, seed=seed, alone=alone)
        self._trainer = trainer
        self._loggers: list[Any] = []
        self._should_stop = False
        self._is_mixed = self.is_mixed

    def __enter__(self) -> TrainerSandbox:
        super().__enter__()
        trainer = self._trainer
        self._loggers = trainer._loggers
        self._should_stop = trainer.should_stop
        trainer._loggers = [_Absorbing(logger) for logger in self._loggers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trainer._loggers = self._loggers
        self._trainer.should_stop = self._should_stop
        super().__exit__(kind, error, trace)

    def evaluate(self, loss_fn: LossFn, batch: Any, parameters: Mapping[Tensor, Tensor], **settings: Any) -> Tensor:
        """Return the loss, under the Trainer's autocast where parameters of several types need it to meet."""
        plugin = self._trainer.precision_plugin
        with plugin.forward_context() if self._is_mixed else nullcontext():
            return super().evaluate(loss_fn, batch, parameters, **settings)


def _silent(module: nn.Module) -> dict[str, Callable[..., None]]:
    # LightningModules can be nested, and a child logs through its parent's trainer. By attribute, not by isinstance:
    # there are two packages.
    return dict.fromkeys(_LOGGING, _ignore) if hasattr(type(module), "log_dict") else {}


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


class _Absorbing:
    """Stands in for a logger, or for what hangs on it: plain data can be read, every call does nothing."""

    def __init__(self, real: Any) -> None:
        self.__dict__["_real"] = real

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        # Users ask isinstance(self.logger, TensorBoardLogger).
        return type(self.__dict__["_real"])

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_real"], name)
        return value if value is None or isinstance(value, _PLAIN) else _Absorbing(value)

    def __setattr__(self, name: str, value: Any) -> None:
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None
