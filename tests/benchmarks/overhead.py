"""What the callback costs a whole run at its defaults, by its own account and by another."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from eos_monitor import EdgeOfStabilityMonitor
from tests.benchmarks.problems import Transformer, cnn, digits, mlp
from tests.benchmarks.tables import Progress, Table

_SECONDS = 75  # of training with the monitor
_PLAIN_SECONDS = 6  # and without
BATCH_HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


class Run(LightningModule):
    """A user's module, which also notes the CPU time of each of its steps."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self._optimizer = net, optimizer
        self.step_seconds: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._optimizer(self.parameters())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        began = time.process_time()
        super().optimizer_step(*args, **kwargs)
        self.step_seconds.append(time.process_time() - began)


class TimedMonitor(EdgeOfStabilityMonitor):
    """The monitor with a clock around each of its hooks, which knows nothing of the monitor's own account."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, **settings: Any) -> None:
        super().__init__(**settings)
        self._hook_clock = clock
        self.hook_seconds: dict[str, list[float]] = defaultdict(list)
        for hook in vars(EdgeOfStabilityMonitor):
            if hook.startswith("on_"):
                setattr(self, hook, self._clocked(hook, getattr(self, hook)))

    def _clocked(self, name: str, hook: Callable[..., None]) -> Callable[..., None]:
        def clocked(*args: Any) -> None:
            began = self._hook_clock()
            try:
                hook(*args)
            finally:
                self.hook_seconds[name].append(self._hook_clock() - began)

        return clocked


class TrainingClock(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds = time.perf_counter() - self.began


@dataclass(frozen=True)
class Workload:
    name: str
    net: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    batch: int


WORKLOADS = (
    Workload("MLP, SGD with momentum", lambda: mlp(200), lambda p: torch.optim.SGD(p, 0.02, momentum=0.9), 128),
    Workload("CNN, Adam", lambda: cnn(4), lambda p: torch.optim.Adam(p, 1e-3), 128),
    Workload("transformer, AdamW", lambda: Transformer(32, 1), lambda p: torch.optim.AdamW(p, 1e-3), 256),
)


def measure(progress: Progress) -> list[Table]:
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    measured = [(workload.name, *_row(workload)) for workload in progress.over(WORKLOADS)]
    overhead = [
        "run",
        "steps",
        "ms a step",
        "readings",
        "own account",
        "clocked from outside",
        "a step, with / without",
    ]
    apart = [
        "run",
        "start-up, s",
        "first reading, s",
        "warm reading, s",
        "its products",
        "after the last step, s",
        "idle, µs a step",
    ]
    return [
        Table("overhead", overhead, [[name, *shares] for name, shares, _ in measured]),
        Table("apart", apart, [[name, *seconds] for name, _, seconds in measured]),
    ]


def _row(workload: Workload) -> tuple[list[str], list[str]]:
    plain, _ = _fit(workload, [], _PLAIN_SECONDS)
    monitor = TimedMonitor()
    watched, seconds = _fit(workload, [monitor], _SECONDS)
    again, _ = _fit(workload, [], _PLAIN_SECONDS)  # before and after, because the machine drifts
    hooks = monitor.hook_seconds
    inside = sum(sum(hooks[hook]) for hook in BATCH_HOOKS)
    readings = [reading for reading in monitor.readings if reading.edge_ratio is not None]
    own = monitor._engine.schedule.overhead
    steps = len(watched.step_seconds)
    shares = [
        f"{steps:,}",
        f"{1e3 * (seconds - inside) / steps:.1f}",
        str(len(readings)),
        f"{own:.1%}",
        f"{inside / (seconds - inside):.1%}",
        f"{median(watched.step_seconds) / median(plain.step_seconds + again.step_seconds):.2f}",
    ]
    apart = [
        f"{sum(hooks['on_fit_start']):.2f}",
        f"{readings[0].seconds:.2f}",
        f"{median(reading.seconds for reading in readings[1:]):.3f}" if readings[1:] else "–",
        f"{median(reading.matvecs for reading in readings[1:]):.0f}" if readings[1:] else "–",
        f"{sum(hooks['on_train_end']):.2f}",
        f"{1e6 * sum(median(hooks[hook]) for hook in BATCH_HOOKS):.0f}",
    ]
    return shares, apart


def _fit(workload: Workload, callbacks: list[Callback], seconds: int) -> tuple[Run, float]:
    torch.manual_seed(3)
    module = Run(workload.net(), workload.optimizer)
    data = TensorDataset(*digits(1700))
    sampler = RandomSampler(data, replacement=True, num_samples=200 * workload.batch)
    clock = TrainingClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=-1,
            max_time={"seconds": seconds},
            callbacks=[clock, *callbacks],  # first, so that the monitor's last hook is not in the time of training
            logger=TensorBoardLogger(folder),
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, DataLoader(data, workload.batch, sampler=sampler))
    return module, clock.seconds
