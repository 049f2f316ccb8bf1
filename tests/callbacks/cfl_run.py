"""One run on two gloo processes with the layer-wise monitor, started as a script; each rank writes what it ended with.

python cfl_run.py WITH|WITHOUT FAULT FOLDER
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from eos_monitor import CFLMonitor, EdgeOfStabilityMonitor, Probe
from eos_monitor.cfl.tiers import CFLGauge
from tests.callbacks.distributed_run import Net, Rows
from tests.callbacks.runs import CLASSES, FEATURES, everything


def main(attached: bool, fault: str, folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    warnings.simplefilter("ignore")
    g = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(64, FEATURES, generator=g), torch.randint(CLASSES, (64,), generator=g)
    )
    monitor = CFLMonitor()
    host = EdgeOfStabilityMonitor(every_n_steps=2, probe=Probe(samples=32), alerts=())

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("on purpose")

    if fault == "fails":
        CFLGauge.measure = fails  # type: ignore[method-assign]
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=Rows(),
        callbacks=[monitor, host] if attached else [],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Net()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
    ours = ("eos/", "cfl/")
    rows = [row for row in trainer.logger.rows if not any(key.startswith(ours) for key in row[1])]
    result = {
        "compared": everything(trainer, module, rows),
        "steps": [step for step, metrics in trainer.logger.rows if any(key.startswith("cfl/") for key in metrics)],
        "layers": [estimate.layer for estimate in monitor.estimates],
        "readings": [reading.step for reading in host.readings],
    }
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1] == "with", sys.argv[2], Path(sys.argv[3]))
