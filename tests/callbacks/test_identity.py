"""A run with the monitor is bit-identical to the run without it; a naive callback is not, so the test can fail."""

import importlib
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from eos_monitor import EdgeOfStabilityMonitor

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
CLASSES, FEATURES = 3, 8

# row -> settings of the module and of the Trainer
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batchnorm-dropout": {"norm": True, "dropout": 0.3},
    "torchmetrics": {"metrics": True},
    "accumulate-bf16-clip-scheduler": {
        "norm": True,
        "dropout": 0.3,
        "metrics": True,
        "scheduler": True,
        "trainer": {
            "accumulate_grad_batches": 4,
            "precision": "bf16-mixed",
            "gradient_clip_val": 0.5,
        },
    },
    # Adam's state is too young for an edge until step 31.
    "adamw": {"optimizer": "adamw", "dropout": 0.3, "trainer": {"max_epochs": 5}},
}


def make_module(
    pl: Any,
    *,
    norm: bool = False,
    dropout: float = 0.0,
    metrics: bool = False,
    scheduler: bool = False,
    optimizer: str = "sgd",
) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = [nn.Linear(FEATURES, 16)]
            if norm:
                layers.append(nn.BatchNorm1d(16))
            layers += [nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES)]
            self.net = nn.Sequential(*layers)
            self.accuracy = MulticlassAccuracy(CLASSES)
            self.mean_loss = MeanMetric()
            self.register_buffer("queue", torch.zeros(4))
            self.calls, self.seen = 0, []
            self.noise = torch.Generator().manual_seed(3)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            self.calls += 1
            x += 0.01 * torch.randn(x.shape, generator=self.noise)  # in place: the batch is the user's to edit
            logits = self.net(x)
            loss = F.cross_entropy(logits, y)
            self.queue = self.queue.roll(1)
            self.queue[0] = loss.detach()
            # Metric states are reset at the end of an epoch; as seen by the step they are part of the run.
            self.seen.append((batch_idx, self.accuracy._update_count, float(self.mean_loss.mean_value)))
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            if metrics:
                self.accuracy(logits, y)
                self.mean_loss(loss)
                self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
                self.log("mean_loss", self.mean_loss, on_step=False, on_epoch=True)
            self.logger.log_metrics({"direct": float(loss.detach())}, step=self.calls)
            return loss

        def configure_optimizers(self) -> Any:
            if optimizer == "adamw":
                return torch.optim.AdamW(self.parameters(), lr=0.01)
            sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            if not scheduler:
                return sgd
            steps = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=6)
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": steps, "interval": "step"}}

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


def run(namespace: str, row: str, tmp_path: Any, make_callback: Any) -> dict[str, Any]:
    pl = importlib.import_module(namespace)
    settings = dict(ROWS[row])
    trainer_settings = settings.pop("trainer", {})
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    x, y = torch.randn(64, FEATURES), torch.randint(CLASSES, (64,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    module, logger = make_module(pl, **settings), make_logger(pl)
    callback = make_callback(pl)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[callback] if callback is not None else [],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"max_epochs": 2, **trainer_settings},
    )
    trainer.fit(module, data)
    metric_states = {
        f"{name}.{state}": getattr(metric, state)
        for name, metric in (("accuracy", module.accuracy), ("mean_loss", module.mean_loss))
        for state in (*metric._defaults, "_update_count")
    }
    ours = [(step, row) for step, row in logger.rows if any(key.startswith("eos/") for key in row)]
    return {
        "callback": callback,
        "ours": ours,
        "compared": {
            "weights": dict(module.named_parameters()),
            "buffers": dict(module.named_buffers()),
            "gradients": {name: p.grad for name, p in module.named_parameters()},
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "metric states": metric_states,
            "attributes": {
                "calls": module.calls,
                "seen": module.seen,
                "noise": module.noise.get_state(),
                "training": [m.training for m in module.modules()],
                "requires_grad": [p.requires_grad for p in module.parameters()],
            },
            "callback_metrics": dict(trainer.callback_metrics),
            "logged_metrics": dict(trainer.logged_metrics),
            "rows": [entry for entry in logger.rows if entry not in ours],
            "rng": [torch.get_rng_state(), np.random.get_state(), random.getstate()],  # noqa: NPY002
        },
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [where]
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
    # NaN equals itself here: the question is whether anything changed.
    return [] if a == b or (a != a and b != b) else [where]


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("row", ROWS)
def test_monitor_leaves_the_run_bit_identical(namespace: str, row: str, tmp_path: Any) -> None:
    without = run(namespace, row, tmp_path, lambda pl: None)
    steps = 2 if "accumulate" in row else 1
    monitored = run(
        namespace, row, tmp_path, lambda pl: EdgeOfStabilityMonitor(every_n_steps=steps, probe_samples=16, alerts=())
    )
    assert differences(without["compared"], monitored["compared"]) == []
    measured = [reading for reading in monitored["callback"].readings if reading.edge_ratio is not None]
    # 2 epochs of 8 steps less the one that fills the probe, plus the end; every other of 4 steps; steps 31 to 40.
    assert len(measured) == {"accumulate-bf16-clip-scheduler": 2, "adamw": 10}.get(row, 16)
    assert len(monitored["ours"]) == len(monitored["callback"].readings)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_naive_callback_is_caught(namespace: str, tmp_path: Any) -> None:
    def naive(pl: Any) -> Any:
        class Naive(pl.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                loss = pl_module.training_step(batch, batch_idx)
                torch.autograd.grad(loss, [p for p in pl_module.parameters()], allow_unused=True)

        return Naive()

    row = "accumulate-bf16-clip-scheduler"
    without = run(namespace, row, tmp_path, lambda pl: None)
    found = differences(without["compared"], run(namespace, row, tmp_path, naive)["compared"])
    kinds = {re.split("[/:]", place)[1] for place in found}
    assert {"weights", "buffers", "gradients", "optimizer", "attributes", "callback_metrics", "rows", "rng"} <= kinds


def test_differences_sees_each_kind_of_change() -> None:
    a = {"t": torch.ones(2), "n": np.ones(2), "l": [1, 2.0], "nan": float("nan")}
    assert differences(a, {**a}) == []
    assert differences(a, {**a, "t": torch.zeros(2)}) == ["/t"]
    assert differences(a, {**a, "n": np.zeros(2)}) == ["/n"]
    assert differences(a, {**a, "l": [1, 3.0]}) == ["/l/1"]
    assert differences(a, {"t": torch.ones(2)}) == [": keys ['l', 'n', 'nan']"]
