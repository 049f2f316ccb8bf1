"""A run whose learning rate jumps, on two gloo processes of different speed, with a monitor that acts.

python acting_run.py CADENCE JUMP FOLDER
"""

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from eos_monitor import EdgeOfStabilityMonitor, Probe, StabilityActions
from tests.callbacks.runs import CLASSES, FEATURES, mlp


class Net(pl.LightningModule):
    def __init__(self, jump: float) -> None:
        super().__init__()
        self.net, self.jump = mlp(), jump

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_rank == 1 and self.global_step % 7 == 0:
            time.sleep(0.02)
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], CLASSES).float())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        # A jump, to the edge or far beyond it, and a slow rise afterwards to where it diverges.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda t: 1.0 if t < 40 else self.jump * 1.05 ** min(t - 40, 100)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Write(pl.Callback):
    def __init__(self, folder: Path, acting: StabilityActions) -> None:
        self.folder, self.acting, self.factors = folder, acting, []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.factors.append(self.acting.factors)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        result = {
            "actions": self.acting.done,
            "factors": self.factors,
            "weights": [p.detach() for p in pl_module.parameters()],
        }
        torch.save(result, self.folder / f"rank{trainer.global_rank}.pt")


def main(cadence: int | None, jump: float, folder: Path) -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    g = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(64, FEATURES, generator=g), torch.randint(CLASSES, (64,), generator=g)
    )
    monitor = EdgeOfStabilityMonitor(every_n_steps=cadence, max_overhead=1.0, probe=Probe(samples=32), alerts=())
    acting = StabilityActions("cap-lr", "restore", "checkpoint", dry_run=False)
    trainer = pl.Trainer(
        max_steps=400,
        max_epochs=-1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        callbacks=[acting, monitor, Write(folder, acting)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Net(jump), torch.utils.data.DataLoader(data, batch_size=32))


if __name__ == "__main__":
    main(int(sys.argv[1]) or None, float(sys.argv[2]), Path(sys.argv[3]))
