"""Hamilton–Jacobi steps under DDP in two gloo processes, started as a script; each rank writes its weights.

python relaxation_run.py FOLDER
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor.callbacks.fresh_batches import RelaxationGuard, fresh_batch
from eos_monitor.optim import HeatSmoothing
from tests.optim.relaxed import make_net, weights


def data() -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(48, 5, generator=g, dtype=torch.float64), torch.randint(3, (48,), generator=g))


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = fresh_batch(self, batch)
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return HeatSmoothing(
            self.parameters(), gamma=1e-2, evaluations=3, generator=torch.Generator().manual_seed(3), momentum=0.9
        )


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    module = Net()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[RelaxationGuard()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(data(), batch_size=12))
    torch.save(weights(module.net), folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
