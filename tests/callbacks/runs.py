"""Small Lightning runs, with everything about them that a monitor could change, for comparison."""

import copy
import importlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
CLASSES, FEATURES = 3, 8


def mlp(*, norm: bool = False, dropout: float = 0.0, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(FEATURES, 16)]
    if norm:
        layers.append(nn.BatchNorm1d(16))
    return nn.Sequential(*layers, activation(), nn.Dropout(dropout), nn.Linear(16, CLASSES))


def sgd(params: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, **settings})


@dataclass(frozen=True)
class Case:
    """One configuration of a run.

    ``state`` sets attributes on the module before training, ``during`` is called in each training step, and
    ``body`` replaces the whole step (manual optimization).
    """

    net: Callable[[], nn.Module] = mlp
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    metrics: bool = False
    state: Callable[[Any], None] | None = None
    during: Callable[[Any, Any], None] | None = None
    body: Callable[[Any, Any], None] | None = None
    optimizers: Callable[[Any], Any] | None = None
    validate: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[Any, Any], Sequence[Any]] | None = None  # (pl, folder) -> callbacks
    monitor: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    batch: Callable[[torch.Tensor, torch.Tensor], Any] | None = None  # collated (x, y) -> what the step gets
    readings: int | None = None  # with an edge ratio; None: at least two
    warns: bool = False
    slow: bool = False


def logs_of(folder: Path) -> Path:
    """Where the last fit without a logger wrote to."""
    versions = (folder / "eos_logs").glob("version_*")
    return max(versions, key=lambda path: int(path.name.removeprefix("version_")), default=folder)


def make_module(pl: Any, case: Case) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = case.net()
            if case.body is not None:
                self.automatic_optimization = False
            if case.metrics:
                self.accuracy = MulticlassAccuracy(CLASSES)
                self.mean_loss = MeanMetric()
                self.both = MetricCollection(
                    {"accuracy": MulticlassAccuracy(CLASSES), "precision": MulticlassPrecision(CLASSES)}, prefix="both/"
                )
            self.calls, self.seen = 0, []
            if case.state is not None:
                case.state(self)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            self.calls += 1
            self.seen.append((batch_idx, self.calls))
            if case.body is not None:
                case.body(self, batch)
                return None
            if case.during is not None:
                case.during(self, batch)
            x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
            logits = self(x)
            loss = F.cross_entropy(logits, y)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            if case.metrics:
                self.accuracy(logits, y)
                self.mean_loss(loss)
                # Metric states are reset at the end of an epoch; as seen by the step they are part of the run.
                self.seen.append((self.accuracy._update_count, float(self.mean_loss.mean_value)))
                self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
                self.log("mean_loss", self.mean_loss, on_step=False, on_epoch=True)
                self.log_dict(self.both(logits, y), on_step=True)
            self.logger.log_metrics({"direct": float(loss.detach())}, step=self.calls)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", F.cross_entropy(self(x), y))

        def configure_optimizers(self) -> Any:
            if case.optimizers is not None:
                return case.optimizers(self)
            optimizer = case.optimizer(p for p in self.parameters() if p.requires_grad)
            if case.scheduler is None:
                return optimizer
            config = case.scheduler(optimizer)
            config = config if isinstance(config, dict) else {"scheduler": config, "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    if not case.validate:
        Module.validation_step = pl.LightningModule.validation_step
    return Module()


def make_logger(pl: Any) -> Any:
    class Rows(pl.loggers.logger.Logger):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int | None, dict[str, float]]] = []

        @property
        def name(self) -> str:
            return "rows"

        @property
        def version(self) -> int:
            return 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, dict(metrics)))

        def log_hyperparams(self, params: Any, *args: Any) -> None:
            pass

    return Rows()


def run(namespace: str, case: Case, folder: Any, make_callback: Callable[[Any], Any]) -> dict[str, Any]:
    """Run ``case`` with the callback, or list of them, that ``make_callback(pl)`` gives (None: without).

    Takes everything down.
    """
    pl = importlib.import_module(namespace)
    folder.mkdir()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    x, y = torch.randn(64, FEATURES), torch.randint(CLASSES, (64,))
    dataset = torch.utils.data.TensorDataset(x, y)

    def collate(samples: Any) -> Any:
        xs, ys = torch.utils.data.default_collate(samples)
        return case.batch(xs, ys) if case.batch is not None else [xs, ys]

    def loader() -> Any:
        return torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=collate)

    validation = torch.utils.data.DataLoader(dataset, batch_size=32) if case.validate else None

    def trainer_for(callback: Any, logger: Any, **settings: Any) -> Any:
        own = list(case.callbacks(pl, folder)) if case.callbacks is not None else []
        defaults: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": logger,
            "callbacks": [*own, *(callback if isinstance(callback, list) else [callback] if callback else [])],
            "log_every_n_steps": 1,
            "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in own),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
        }
        return pl.Trainer(**{**defaults, **case.trainer, **settings})

    module, logger, callback = make_module(pl, case), make_logger(pl), make_callback(pl)
    trainer = trainer_for(callback, logger)
    trainer.fit(module, loader(), validation)
    if case.resume:
        path = folder / f"{namespace}-{callback is not None}.ckpt"
        trainer.save_checkpoint(path)
        module, callback = make_module(pl, case), make_callback(pl)
        trainer = trainer_for(callback, logger, max_epochs=4)
        trainer.fit(module, loader(), validation, ckpt_path=path)
    ours = [row for row in logger.rows if any(key.startswith(("eos/", "cfl/", "perturbation/")) for key in row[1])]
    return {
        "callback": callback,
        "ours": ours,
        "compared": everything(trainer, module, [row for row in logger.rows if row not in ours]),
    }


def everything(trainer: Any, module: Any, rows: list[Any]) -> dict[str, Any]:
    own = {
        f"{name}.{key}": plain(value)
        for name, child in module.named_modules()
        for key, value in child.__dict__.items()
        if not key.startswith("_") or key in ("_update_count", "_computed")
    }
    return {
        "weights": dict(module.named_parameters()),
        "buffers": dict(module.named_buffers()),
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "attributes": own,
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "versions": [p._version for p in module.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
        "callback_metrics": dict(trainer.callback_metrics),
        "logged_metrics": dict(trainer.logged_metrics),
        "progress": [trainer.global_step, trainer.current_epoch, trainer.should_stop],
        "rows": rows,
        "rng": [torch.get_rng_state(), np.random.get_state(), random.getstate()],  # noqa: NPY002
    }


def plain(value: Any) -> Any:
    """What of an attribute can be compared."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray | bool | int | float | str | tuple | list | dict):
        return copy.deepcopy(value)
    if isinstance(value, deque):
        return list(value)
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    return type(value).__name__


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places where two results are not the same, bit by bit."""
    if isinstance(a, torch.Tensor):
        if a.is_sparse and isinstance(b, torch.Tensor) and b.is_sparse:
            a, b = a.to_dense(), b.to_dense()
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        # NaN equals itself here: the question is whether anything changed.
        return [] if same and bool(((a == b) | ((a != a) & (b != b))).all()) else [where]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(a.keys() ^ b.keys(), key=str)}"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: {len(a)} != {len(b)}"]
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{where}/{i}")]
    return [] if a == b or (a != a and b != b) else [where]
