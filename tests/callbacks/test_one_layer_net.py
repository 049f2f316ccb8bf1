"""Paper 001's one-layer net under the real callbacks, against its closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eos_monitor import CFLMonitor, EdgeOfStabilityMonitor, Probe

SIDE = 32
ALPHA = 20.0
PLACES = 225**2
PLUS = (PLACES + 1) // 2 / PLACES  # share of the image's patches that begin with −1; the others are their negatives
RATES = (0.01, 0.03, 0.05, 0.07, 0.09, 0.105, 0.13)


def checkerboard() -> np.ndarray:
    rows, columns = np.divmod(np.arange(SIDE**2), SIDE)
    return np.where((rows + columns) % 2 == 0, -1.0, 1.0)


class OneLayer(pl.LightningModule):
    """One kernel on a checkerboard, whose two distinct patches stand for all 225²; loss softplus(−mean of swish)."""

    def __init__(self, lr: float, seed: int, decay_in_loss: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, SIDE, bias=False, dtype=torch.float64)
        kernel = np.random.RandomState(seed).randn(1, 1, SIDE, SIDE)
        self.conv.weight.data.copy_(torch.from_numpy(kernel))
        self.rate = lr
        self.decay_in_loss = decay_in_loss
        self.kernels: list[np.ndarray] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        patches = batch[0][0]  # (2, 1, 32, 32)
        swish = F.silu(self.conv(patches).flatten())
        loss = F.softplus(-(PLUS * swish[0] + (1 - PLUS) * swish[1]))
        return loss + ALPHA / 2 * self.conv.weight.square().sum() if self.decay_in_loss else loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.kernels.append(self.conv.weight.detach().numpy().ravel().copy())

    def on_train_end(self) -> None:
        self.on_train_batch_start(None, 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.rate, weight_decay=0.0 if self.decay_in_loss else ALPHA)


def curvature(kernel: np.ndarray) -> float:
    """α + max(0, the curvature along the patch), by hand."""
    z = float(checkerboard() @ kernel)
    s, t = (0.5 * (1 + math.tanh(x / 2)) for x in (z, -z))
    first = [s + z * s * (1 - s), t - z * t * (1 - t)]
    second = [s * (1 - s) * (2 + z * (1 - 2 * s)), t * (1 - t) * (2 - z * (1 - 2 * t))]
    f = PLUS * z * s - (1 - PLUS) * z * t
    wrong = 0.5 * (1 - math.tanh(f / 2))
    f1 = PLUS * first[0] - (1 - PLUS) * first[1]
    f2 = PLUS * second[0] + (1 - PLUS) * second[1]
    return ALPHA + max(0.0, SIDE**2 * (wrong * (1 - wrong) * f1**2 - wrong * f2))


class Layers(CFLMonitor):
    """Keeps every estimate."""

    def __init__(self) -> None:
        super().__init__(exact=True)
        self.found: list[tuple[int, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self.found += [(trainer.global_step - 1, e) for e in self.estimates if e.method == "exact"]


def run(lr: float, seed: int, decay_in_loss: bool, every: int, folder: Path) -> tuple[int, int]:
    """Train for 300 steps; hold every reading and every exact layer to the closed form, and return their numbers."""
    patch = torch.from_numpy(checkerboard()).view(1, SIDE, SIDE)
    patches = torch.stack([patch, -patch])[None]
    monitor = EdgeOfStabilityMonitor(every_n_steps=every, probe=Probe(full_batch=True), alerts=(), verify=False)
    layers = Layers()
    net = OneLayer(lr, seed, decay_in_loss)
    pl.Trainer(
        max_epochs=300,
        accelerator="cpu",
        logger=False,
        callbacks=[layers, monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(net, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(patches), batch_size=1))
    truths = [lr / 2 * curvature(kernel) for kernel in net.kernels]
    off = [
        (reading.step, reading.edge_ratio, truths[reading.step])
        for reading in monitor.readings
        if reading.edge_ratio != pytest.approx(truths[reading.step], rel=0.01) or not reading.converged
    ]
    assert off == []
    off = [
        (step, e.cfl_number, truths[step])
        for step, e in layers.found
        if step % every == 0 and e.cfl_number != pytest.approx(truths[step], rel=0.01)
    ]
    assert off == []
    return len(monitor.readings), len(layers.found)


@pytest.mark.parametrize("decay_in_loss", [True, False], ids=["in-loss", "in-optimizer"])
@pytest.mark.parametrize("lr", [0.05, 0.09])
def test_readings_of_the_one_layer_net(lr: float, decay_in_loss: bool, tmp_path: Path) -> None:
    readings, layers = run(lr, 7, decay_in_loss, 5, tmp_path)
    assert readings >= 50
    assert layers >= 10


@pytest.mark.slow
@pytest.mark.parametrize("decay_in_loss", [True, False], ids=["in-loss", "in-optimizer"])
@pytest.mark.parametrize("lr", RATES)
@pytest.mark.parametrize("seed", [7, 0, 1])
def test_readings_of_all_runs_of_the_one_layer_net(seed: int, lr: float, decay_in_loss: bool, tmp_path: Path) -> None:
    assert run(lr, seed, decay_in_loss, 5, tmp_path)[0] >= 50
