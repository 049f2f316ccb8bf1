"""What the callback does at every step when no reading is due, and what following the updates costs."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor.readings.settings import Probe
from eos_monitor.verdicts.projector import UpdateProjector
from tests.benchmarks.clock import interleaved
from tests.benchmarks.optimizers import peak
from tests.benchmarks.overhead import BATCH_HOOKS, TimedMonitor
from tests.benchmarks.problems import Transformer, cnn, digits, mlp
from tests.benchmarks.tables import Progress, Table

_STEPS, _FROM, _EVERY = 480, 96, 64
_ROUNDS = 31
NETS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: mlp(32),
    "CNN": lambda: cnn(12),
    "transformer": lambda: Transformer(128, 3),
}
LARGE: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: mlp(1950),
    "transformer": lambda: Transformer(256, 5),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-3),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda optimizer: None,
    "StepLR": lambda optimizer: StepLR(optimizer, 30, 0.99),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=1e-3, total_steps=2 * _STEPS),
}


class Run(LightningModule):
    """A user's module with two parameter groups."""

    def __init__(self, net: nn.Module, optimizer: str, scheduler: str) -> None:
        super().__init__()
        self.net, self._optimizer, self._scheduler = net, optimizer, scheduler

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        params = list(self.net.parameters())
        groups = [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 1e-2},
            {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = OPTIMIZERS[self._optimizer](groups)
        scheduler = SCHEDULERS[self._scheduler](optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def measure(progress: Progress) -> list[Table]:
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = []
    for net, optimizer in progress.over([(net, optimizer) for net in NETS for optimizer in OPTIMIZERS]):
        idle = {scheduler: _microseconds(net, optimizer, scheduler, projections=False) for scheduler in SCHEDULERS}
        followed = _microseconds(net, optimizer, "none", projections=True)
        size = sum(p.numel() for p in NETS[net]().parameters())
        cells = [*idle.values(), followed - idle["none"]]
        rows.append([net, f"{size:,}", optimizer, *(f"{cell:.0f}" for cell in cells)])
    head = ["net", "parameters", "optimizer", *(f"scheduler: {name}" for name in SCHEDULERS), "updates followed: more"]
    return [Table("steps", head, rows), _updates()]


def _microseconds(net: str, optimizer: str, scheduler: str, *, projections: bool) -> float:
    """CPU time of the callback's hooks in a step without a reading: median over 64 steps each, of the means in them."""
    torch.manual_seed(3)
    monitor = TimedMonitor(
        time.thread_time, every_n_steps=_EVERY, projections=projections, verify=False, probe=Probe(samples=32)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=_STEPS,
            callbacks=[monitor],
            logger=False,
            accelerator="cpu",
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        data = TensorDataset(*digits(512))
        trainer.fit(Run(NETS[net](), optimizer, scheduler), DataLoader(data, 32, shuffle=True))
    seconds = list(map(sum, zip(*(monitor.hook_seconds[hook] for hook in BATCH_HOOKS), strict=True)))
    read = {reading.step for reading in monitor.readings}
    # Means, because what a scheduler will do is looked up for many steps at once.
    lots = [
        [seconds[step] for step in range(first, first + _EVERY) if step not in read]
        for first in range(_FROM, _STEPS - _EVERY, _EVERY)
    ]
    return 1e6 * median(map(mean, lots))


def _updates() -> Table:
    rows = []
    for name, build in LARGE.items():
        torch.manual_seed(0)
        params = [p.detach() for p in build().parameters()]
        copies, n = [torch.empty_like(p) for p in params], sum(p.numel() for p in params)
        motion = UpdateProjector(params)
        motion.project_on(torch.randn(n))

        def follow(motion: UpdateProjector = motion) -> None:
            motion.before()
            motion.after()

        held = peak(follow)
        seconds = interleaved({"copy": partial(torch._foreach_copy_, copies, params), "follow": follow}, _ROUNDS)
        rows.append(
            [
                name,
                f"{n:,}",
                len(params),
                f"{1e3 * seconds['copy']:.2f}",
                f"{1e3 * seconds['follow']:.2f}",
                f"{seconds['follow'] / seconds['copy']:.1f}",
                f"{held / (4 * n):.2f}",
            ]
        )
    head = ["net", "parameters", "tensors", "one copy, ms", "following, ms", "in copies", "memory, in copies"]
    return Table("updates", head, rows)
