"""Epochs that a module cuts short: a reading of a step that never came is no reading of the run."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import EdgeOfStabilityMonitor, Probe

BATCHES = 4
EPOCHS = 3


class Impatient(pl.LightningModule):
    """Skips the rest of an epoch from a batch on."""

    def __init__(self, skipped: set[tuple[int, int]]) -> None:
        super().__init__()
        self.body = nn.Linear(3, 1)
        self.skipped = skipped

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if (self.current_epoch, batch_idx) in self.skipped else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def readings(probe: Any, skipped: set[tuple[int, int]], tmp_path: Any) -> tuple[list[int], int]:
    torch.manual_seed(0)
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, probe=probe)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[monitor],
    )
    data = TensorDataset(torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(0)))
    trainer.fit(Impatient(skipped), DataLoader(data, batch_size=4))
    return [reading.step for reading in monitor.readings], trainer.global_step


@pytest.mark.parametrize(
    ("skipped", "steps"),
    [(set(), 12), ({(2, 0)}, 8), ({(2, 2)}, 10), ({(1, 0)}, 8), ({(0, 3), (1, 1), (2, 2)}, 6)],
    ids=["none", "last", "rest-of-last", "middle", "rest-of-each"],
)
def test_each_step_that_was_taken_has_one_reading(skipped: set[tuple[int, int]], steps: int, tmp_path: Any) -> None:
    """On the batch of the step no reading follows at the end, so that one too many would be of a skipped batch."""
    assert readings("batch", skipped, tmp_path) == (list(range(steps)), steps)
    # On fixed batches the end of the run has one of its own.
    assert readings(Probe(samples=4), skipped, tmp_path) == (list(range(steps + 1)), steps)
