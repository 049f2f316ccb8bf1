"""One run on two gloo processes, started as a script; each rank writes what it ended with.

python distributed_run.py STRATEGY MONITOR FAULT SAMPLES FOLDER
"""

import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from eos_monitor import EdgeOfStabilityMonitor, Probe
from eos_monitor.callbacks.monitored_fit import MonitoredFit
from eos_monitor.callbacks.trainer_gauge import TrainerGauge
from tests.callbacks.runs import CLASSES, FEATURES, everything, make_logger

Rows = type(make_logger(pl))
Rows.__qualname__, Rows.__module__ = "Rows", __name__  # where a spawned process can find it


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class FaultyLoss:
    """The training loss without dropout; on rank 1 late or failing now and then."""

    def __init__(self, fault: str) -> None:
        self.fault, self.calls = fault, 0

    def __call__(self, module: Any, batch: Any) -> torch.Tensor:
        self.calls += 1
        if module.global_rank == 1 and self.fault.startswith("late"):
            if self.calls % 10 == 0:
                time.sleep(0.2)
            if self.calls % 83 == 0 and self.fault == "late-and-raises":
                raise RuntimeError("rank 1 on purpose")
        x, y = batch
        net = module.net
        return F.cross_entropy(net[3](net[1](net[0](x))), y)


class Write(pl.Callback):
    """Runs in the process that trains, also where that was spawned."""

    def __init__(self, folder: Path, monitor: Any) -> None:
        self.folder, self.monitor, self.weights = folder, monitor, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Before the monitor's own hook of this batch: the weights after the step, which the next reading measures.
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        rows = [row for row in trainer.logger.rows if not any(key.startswith("eos/") for key in row[1])]
        result = {"compared": everything(trainer, pl_module, rows), "readings": [], "verdict": None}
        if self.monitor is not None:
            result["readings"] = [
                (r.step, r.edge_ratio, r.sharpness, r.loss, r.samples, r.matvecs) for r in self.monitor.readings
            ]
            # A reading before step n measures what step n − 1 left.
            result["weights at the readings"] = [self.weights[r.step - 1] for r in self.monitor.readings]
            result["off"] = self.monitor.off
            result["verdict"] = [(step, int(verdict)) for step, verdict in self.monitor._engine.verdicts]
        torch.save(result, self.folder / f"rank{trainer.global_rank}.pt")


def fail_at_the_end(monitor: EdgeOfStabilityMonitor, trainer: pl.Trainer) -> None:
    """Let every fifth reading fail on rank 1, when the last product has been summed."""
    gauge, calls = monitor._engine._gauge, 0
    measure = gauge.measure

    def measure_and_fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        measurement = measure(*args, **kwargs)
        if trainer.global_rank == 1 and calls % 5 == 0:
            raise MemoryError("rank 1 on purpose")
        return measurement

    gauge.measure = measure_and_fail  # type: ignore[method-assign]


HOOKS = {
    "begin": (MonitoredFit, "__init__"),
    "batch": (TrainerGauge, "collect"),
    "update": (MonitoredFit, "_begin_update"),
    "loss": (MonitoredFit, "_add_loss"),
    "write": (MonitoredFit, "_write"),
}


def fail_in_a_hook(place: str, trainer: pl.Trainer) -> None:
    """Let something that no reading contains fail on rank 1, from the fifth time on (the beginning at once)."""
    cls, name = HOOKS[place]
    real, calls = getattr(cls, name), 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if trainer.global_rank == 1 and (calls >= 5 or place == "begin"):
            raise ArithmeticError("rank 1 on purpose")
        return real(*args, **kwargs)

    setattr(cls, name, fails)


def main(strategy: str, with_monitor: bool, fault: str, samples: int, folder: Path) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    warnings.simplefilter("ignore")
    g = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(samples, FEATURES, generator=g), torch.randint(CLASSES, (samples,), generator=g)
    )
    monitor = None
    if with_monitor:
        cadence = (
            None if fault == "late" or fault.endswith("clock") else 1
        )  # by the clock, which is another one on each rank
        monitor = EdgeOfStabilityMonitor(
            every_n_steps=cadence, max_overhead=1.0, loss_fn=FaultyLoss(fault), probe=Probe(samples=32), alerts=()
        )
    trainer = pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        devices=2,
        strategy=pl.strategies.DDPStrategy(static_graph=True) if strategy == "static" else strategy,
        logger=Rows(),
        callbacks=[Write(folder, monitor), *([monitor] if monitor else [])],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    if monitor is not None and fault.startswith("hook-"):
        fail_in_a_hook(fault.split("-")[1], trainer)
    if monitor is not None and fault == "fails-at-the-end":
        fail_at_the_end(monitor, trainer)
    trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))


if __name__ == "__main__":
    name, monitored, kind, count, where = sys.argv[1:]
    main(name, monitored == "with", kind, int(count), Path(where))
