"""The mean loss over the batches of a probe, as a function of the module's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eos_monitor.cfl.calls import Capture, Observer
from eos_monitor.cfl.capture import capture
from eos_monitor.isolation.sandbox import LossFn, Sandbox


@dataclass(frozen=True)
class Objective:
    """The mean loss over some batches, evaluated one batch at a time.

    Attributes:
        sandbox: Sandbox of the module, entered.
        module: Module.
        loss_fn: ``loss_fn(module, batch)`` -> mean loss.
        batches: Batches, weighted by their samples.
        samples: Samples in each.
    """

    sandbox: Sandbox
    module: nn.Module
    loss_fn: LossFn
    batches: Sequence[Any]
    samples: Sequence[int]

    @property
    def shares(self) -> list[float]:
        """Share of all samples that each batch has."""
        return [n / sum(self.samples) for n in self.samples]

    def evaluate(self, i: int, parameters: Mapping[Tensor, Tensor]) -> Tensor:
        """Return the loss of batch ``i`` with tensors in the place of live parameters."""
        return self.sandbox.evaluate(self.loss_fn, self.batches[i], parameters, stream=i)

    def capture(self, i: int, parameters: Mapping[Tensor, Tensor], observers: Sequence[Observer] = ()) -> Capture:
        """Evaluate the loss of batch ``i`` and record its layers; see :func:`eos_monitor.cfl.capture.capture`.

        Raises:
            ValueError: If the loss runs through no layer.
        """
        return capture(
            self.sandbox,
            self.module,
            self.loss_fn,
            self.batches[i],
            parameters=parameters,
            stream=i,
            observers=observers,
        )
