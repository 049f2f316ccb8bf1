"""Runs that fail by their learning rate, with and without a monitor that acts, and the best they could do.

``python -m tests.callbacks.governed_runs`` rewrites the table of docs/actions.md.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from tqdm import tqdm

from eos_monitor import EdgeOfStabilityMonitor, Probe, StabilityActions
from tests.benchmarks.tables import Table, write
from tests.callbacks.runs import CLASSES, FEATURES, mlp

SAMPLES = 384
STEPS = 300
GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # × the rate given for a run, at which it is tried in full


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(36, CLASSES)
        )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(2, 8), nn.LayerNorm(8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(4 * FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x.view(-1, FEATURES // 2, 2))
        n = self.norm(h)
        return self.head((h + self.attention(n, n, n, need_weights=False)[0]).flatten(1))


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, y)


def squares(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(outputs, F.one_hot(y, CLASSES).float())


Optimize = Callable[[Any, float], torch.optim.Optimizer]


def momentum(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def adamw(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.01)


@dataclass(frozen=True)
class Run:
    """A run whose learning rate is scheduled to become too high."""

    net: Callable[[], nn.Module]
    optimizer: Optimize
    lr: float
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    batch: int = SAMPLES
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy
    every: int = 5
    monitor: dict[str, Any] = field(default_factory=dict)


def jump(at: int, factor: float) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda o: lr_scheduler.LambdaLR(o, lambda t: factor if t >= at else 1.0)


RUNS: dict[str, Run] = {
    "mlp-momentum-jump": Run(mlp, momentum, 0.05, jump(100, 60.0), loss=squares),
    "mlp-momentum-minibatch-jump": Run(mlp, momentum, 0.02, jump(100, 200.0), batch=96),
    "mlp-adamw-jump": Run(mlp, adamw, 0.003, jump(100, 1000.0)),
    "mlp-momentum-constant": Run(mlp, momentum, 5.0, loss=squares),
    "conv-momentum-onecycle": Run(
        Convolutional,
        momentum,
        60.0,
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=60.0, total_steps=STEPS, pct_start=0.2),
    ),
    "conv-adamw-steps": Run(
        Convolutional, adamw, 0.003, lambda o: lr_scheduler.MultiStepLR(o, milestones=[100], gamma=1000.0)
    ),
    "conv-momentum-minibatch-warmup": Run(
        Convolutional,
        momentum,
        10.0,
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.001, total_iters=60),
        batch=96,
        loss=squares,
    ),
    "attention-momentum-steps": Run(
        Attention, momentum, 0.05, lambda o: lr_scheduler.MultiStepLR(o, milestones=[80, 160], gamma=10.0)
    ),
    "attention-adamw-restarts": Run(
        Attention,
        adamw,
        2.0,
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.ConstantLR(o, factor=0.001, total_iters=60),
                lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=80),
            ],
            milestones=[60],
        ),
    ),
    "attention-momentum-cyclic": Run(
        Attention,
        momentum,
        0.02,
        lambda o: lr_scheduler.CyclicLR(o, base_lr=0.02, max_lr=4.0, step_size_up=40, cycle_momentum=False),
    ),
}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes by a random linear rule; one label in five is drawn anew, so that no run gets to zero."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, FEATURES, generator=g)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=g)).argmax(1)
    wrong = torch.rand(SAMPLES, generator=g) < 0.2
    return x, torch.where(wrong, torch.randint(CLASSES, (SAMPLES,), generator=g), y)


def loop(run: Run, lr: float, *, scheduled: bool, seed: int = 0) -> list[float]:
    """Train without Lightning and without the monitor; return the losses."""
    torch.manual_seed(seed)
    net, (x, y) = run.net(), data()
    optimizer = run.optimizer(net.parameters(), lr)
    scheduler = run.schedule(optimizer) if scheduled and run.schedule is not None else None
    losses = []
    for t in range(STEPS):
        place = t * run.batch % SAMPLES
        loss = run.loss(net(x[place : place + run.batch]), y[place : place + run.batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
    return losses


def fit(run: Run, folder: Path, seed: int = 0) -> tuple[list[float], StabilityActions, Any]:
    """Train with Lightning and the monitor; return losses, actions and Trainer."""
    losses: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.net = run.net()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = run.loss(self.net(batch[0]), batch[1])
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = run.optimizer(self.parameters(), run.lr)
            if run.schedule is None:
                return optimizer
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": run.schedule(optimizer), "interval": "step"},
            }

    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        return run.loss(module.net(batch[0]), batch[1])

    monitor = EdgeOfStabilityMonitor(
        every_n_steps=run.every, probe=Probe(samples=SAMPLES), loss_fn=loss_fn, alerts=(), **run.monitor
    )
    acting = StabilityActions("cap-lr", "restore", dry_run=False)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=run.batch)
    trainer = pl.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=[monitor, acting],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Module(), loader)
    return losses, acting, trainer


def final(losses: list[float]) -> float:
    """Mean of the last 20 losses; infinite where the run ended before."""
    last = losses[-20:]
    return statistics.fmean(last) if len(losses) >= STEPS and all(map(math.isfinite, last)) else math.inf


def fails(losses: list[float]) -> bool:
    """Whether a loss is not finite, or, past the first steps, above 3 × the median of up to 64 before it."""
    return not all(map(math.isfinite, losses)) or any(
        losses[t] > 3 * statistics.median(losses[max(0, t - 64) : t]) for t in range(20, len(losses))
    )


def best(run: Run, seed: int = 0) -> float:
    """Final loss at the best of a grid of fixed learning rates."""
    top = max(_rates(run))
    return min(final(loop(run, factor * top, scheduled=False, seed=seed)) for factor in GRID)


def _rates(run: Run) -> list[float]:
    """Learning rates that the schedule goes through."""
    optimizer = run.optimizer([nn.Parameter(torch.zeros(1))], run.lr)
    scheduler = run.schedule(optimizer) if run.schedule is not None else None
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return rates


def holds(run: Run, folder: Path, seed: int = 0) -> bool:
    """Whether a monitor that acts brings the run to within 1.5 × of the best fixed learning rate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CyclicLR and SequentialLR warn of themselves
        losses, acting, _ = fit(run, folder, seed)
    assert acting.done
    return final(losses) <= 1.5 * best(run, seed)


def table(seeds: Sequence[int], folder: Path) -> Table:
    rows = []
    for seed in seeds:
        names = tqdm(RUNS.items(), desc=f"seed {seed}")
        failed = sum(fails(loop(run, run.lr, scheduled=True, seed=seed)) for run in RUNS.values())
        held = sum(holds(run, folder / f"{seed}-{name}", seed) for name, run in names)
        rows.append([seed, f"{failed} of {len(RUNS)}", f"{held} of {len(RUNS)}"])
    return Table("governed", ["seed", "fail without", "end within 1.5 × of the best with"], rows)


if __name__ == "__main__":
    with TemporaryDirectory() as runs:
        write([table((0, 1, 2), Path(runs))], Path(__file__).parents[2] / "docs" / "actions.md")
