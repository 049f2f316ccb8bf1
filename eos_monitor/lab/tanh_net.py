"""The net of the demo, and the batches that it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, count, islice

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

_WIDTH = 64

Batch = tuple[Tensor, Tensor]


class TanhNet(LightningModule):
    """The net 64-64-64-10 in float64, with half the squared distance to the one-hot label as its loss.

    Args:
        optimizer: Makes the optimizer from parameters.
        warm_up: Steps of linear warm-up.

    Attributes:
        losses: ``(step, training loss)`` of every step.
    """

    def __init__(self, optimizer: Callable[[Iterator[nn.Parameter]], Optimizer], warm_up: int) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._warm_up = warm_up
        self.net = nn.Sequential(
            nn.Linear(64, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, 10)
        ).double()
        self.losses: list[tuple[int, float]] = []

    def curvature_loss(self, batch: Batch) -> Tensor:
        """Return the loss that the monitor measures."""
        images, targets = batch
        loss: Tensor = 0.5 * (self.net(images) - targets).square().sum(dim=1).mean()
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss, and keep its value."""
        loss = self.curvature_loss(batch)
        self.losses.append((batch_idx, loss.item()))
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer with its warm-up."""
        optimizer = self._optimizer(self.net.parameters())
        warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self._warm_up))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


class StepBatches(Dataset[Batch]):
    """A batch for each step, in passes over the data, shuffled unless it is one batch: one epoch, one progress bar."""

    def __init__(self, data: Batch, batch_size: int | None, steps: int, seed: int) -> None:
        self._data = data
        samples = len(data[0])
        if batch_size is None:
            self._picked = [torch.arange(samples)] * steps
        else:
            generator = torch.Generator().manual_seed(seed)
            passes = (torch.split(torch.randperm(samples, generator=generator), batch_size) for _ in count())
            self._picked = list(islice(chain.from_iterable(passes), steps))

    def __len__(self) -> int:
        return len(self._picked)

    def __getitem__(self, index: int) -> Batch:
        images, targets = self._data
        picked = self._picked[index]
        return images[picked], targets[picked]
