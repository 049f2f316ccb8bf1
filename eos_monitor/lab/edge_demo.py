"""Gradient descent, AdamW and minibatch SGD on scikit-learn's digits, each at its own edge of stability."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  # the figures are half of the demo: miss it before the runs, not after
import torch
from lightning_utilities.core import rank_zero
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from eos_monitor.callbacks.edge_of_stability import EdgeOfStabilityMonitor
from eos_monitor.dashboard.figures import normalized_batch_sharpness, runs_figure
from eos_monitor.readings.settings import Probe, Solver

# Odd, because at the edge the weights flip with period 2: an even cadence would always see the same side.
_READ_EVERY = 15
_SAMPLES = 1000
_WIDTH = 64
_GD_LR = 0.1
_ADAMW_LR = 2e-3
# torch's defaults, repeated because the theory's threshold needs them.
_ADAMW_BETAS = (0.9, 0.999)
_ADAMW_DECAY = 1e-2
# Tuned: at 0.4 this net stays further below its edge (lr·BS/2 = 0.6); at 0.7 it diverged.
_SGD_LR = 0.65
_SGD_WARM_UP = 300
_SGD_BATCH = 8

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Case:
    name: str
    settings: str
    theory: float
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer]
    batch_size: int | None = None  # None: the full batch
    centred: bool = False
    warm_up: int = 1
    read_every: int = _READ_EVERY
    probe_samples: int = _SAMPLES
    rtol: float = 1e-2


# The thresholds are written out from theory, so that the table does not compare the package with itself.
_CASES = (
    _Case("gradient descent", f"lr {_GD_LR:g}", 2.0, lambda params: torch.optim.SGD(params, lr=_GD_LR)),
    _Case(
        "AdamW",
        f"lr {_ADAMW_LR:g}",
        (2 + 2 * _ADAMW_BETAS[0]) / (1 - _ADAMW_BETAS[0]) * (1 - _ADAMW_LR * _ADAMW_DECAY / 2),
        lambda params: torch.optim.AdamW(params, lr=_ADAMW_LR, betas=_ADAMW_BETAS, weight_decay=_ADAMW_DECAY),
    ),
    _Case(
        "minibatch SGD",
        f"lr {_SGD_LR:g}, B {_SGD_BATCH}",
        2.0,
        lambda params: torch.optim.SGD(params, lr=_SGD_LR),
        batch_size=_SGD_BATCH,
        # Pixels that are never negative share one direction of large curvature, which hides the part of the noise.
        centred=True,
        warm_up=_SGD_WARM_UP,
        # A reading takes each of the probe's 32 batches on its own, and costs many times as much.
        read_every=95,
        probe_samples=256,
        rtol=3e-2,  # of r; its sampling error on this probe is more
    ),
)


@dataclass(frozen=True)
class EdgeRun:
    """What one run showed.

    Attributes:
        name: Optimizer, in words.
        settings: Its settings, in words.
        theory: Its threshold of lr·λ_max(P⁻¹H), by the formula; with minibatches, also of lr · batch sharpness.
        steps: Optimizer steps taken.
        rows: Readings as in ``eos_readings.jsonl``, oldest first.
        losses: ``(step, training loss)`` of every step.
        seconds: Wall-clock time of the fit.
        folder: Where events, readings and figure are.
        minibatches: Whether a step uses a part of the data.
    """

    name: str
    settings: str
    theory: float
    steps: int
    rows: tuple[Mapping[str, Any], ...]
    losses: tuple[tuple[int, float], ...]
    seconds: float
    folder: Path
    minibatches: bool = False

    @property
    def measured(self) -> tuple[Mapping[str, Any], ...]:
        """Readings with an edge ratio; AdamW's first have none, its state is too young."""
        return tuple(row for row in self.rows if row["edge_ratio"] is not None)

    def mean(self, key: str, first_step: int) -> float | None:
        """Return the mean of a row key over the readings from ``first_step`` on; None if there are none."""
        values = [row[key] for row in self.measured if row["step"] >= first_step]
        return statistics.fmean(values) if values else None

    def mean_batch_sharpness(self, first_step: int) -> float | None:
        """Return the mean of lr · batch sharpness from ``first_step`` on; None if it was not measured."""
        found = [normalized_batch_sharpness(row) for row in self.rows if row["step"] >= first_step]
        values = [value for value in found if value is not None]
        return statistics.fmean(values) if values else None

    @property
    def steps_to_edge(self) -> int | None:
        """Step of the first reading with an edge ratio of 1 or more."""
        return next((row["step"] for row in self.measured if row["edge_ratio"] >= 1.0), None)

    @property
    def first_edge_ratio(self) -> float | None:
        """Edge ratio of the first reading that has one."""
        return self.measured[0]["edge_ratio"] if self.measured else None

    @property
    def products(self) -> int | None:
        """Median number of Hessian-vector products of a reading."""
        return statistics.median_high(row["matvecs"] for row in self.measured) if self.measured else None

    @property
    def overhead(self) -> float | None:
        """Time spent on readings as a share of the training time."""
        return self.rows[-1]["overhead"] if self.rows else None


@dataclass(frozen=True)
class EdgeDemo:
    """The three runs, and the figure that shows them side by side."""

    gradient_descent: EdgeRun
    adamw: EdgeRun
    minibatch_sgd: EdgeRun
    figure: Path

    @property
    def runs(self) -> tuple[EdgeRun, EdgeRun, EdgeRun]:
        """All runs, oldest first."""
        return self.gradient_descent, self.adamw, self.minibatch_sgd


def run_edge_demo(output: str | Path = "eos_demo", steps: int = 1200, seed: int = 0) -> EdgeDemo:
    """Train a tanh net by full-batch gradient descent, by full-batch AdamW and by minibatch SGD, with the monitor.

    The net is 64-64-64-10, in float64; the loss is half the squared distance to the one-hot label, averaged over the
    first 1000 digits. Under gradient descent lr·λ_max(H) climbs to 2 and stays there; under AdamW the preconditioned
    lr·λ_max(P⁻¹H) does the same at (2 + 2β1)/(1 − β1), which is 38 for β1 = 0.9.

    With batches of 8 another number marks the edge: the batch sharpness, a batch's curvature along its own gradient on
    average, rises towards 2/lr and stays near it, within the 25 % that this mark is good to, while λ_max(H) stays at
    half of it or little more: at 0.5 on all 1000 digits, at 0.6 on the probe of 256. Data and learning rate of this
    run were chosen so that it does: lr 0.65 after 300 steps of linear warm-up, and each pixel centred by itself. At lr
    0.4 this net stays further below its edge (lr·BS/2 is 0.6), and at 0.7 it diverged.

    Args:
        output: Folder for events, readings and figures.
        steps: Optimizer steps of each run, ≥ 1; the climb takes some hundreds.
        seed: Seed of the initial weights, and of the order of the minibatches.

    Raises:
        ValueError: If ``steps`` is not positive.

    References:
        J. Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability", 2021,
        arXiv 2103.00065. J. Cohen et al., "Adaptive Gradient Methods at the Edge of Stability", 2022,
        arXiv 2207.14484. A. Andreyev and P. Beneventano, "Edge of Stochastic Stability", 2024, arXiv 2412.20553.
    """
    if steps < 1:
        raise ValueError(f"Expected `steps` >= 1, got {steps}.")
    folder = Path(output)
    gradient_descent, adamw, minibatch_sgd = (_train(case, folder, steps, seed) for case in _CASES)
    demo = EdgeDemo(gradient_descent, adamw, minibatch_sgd, folder / "edge_of_stability.png")
    panels = [(f"{run.name}, {run.settings}", run.rows, run.losses) for run in demo.runs]
    runs_figure(panels).savefig(demo.figure, dpi=110)
    return demo


def edge_table(demo: EdgeDemo) -> str:
    """Return a table of what was seen beside what theory says."""
    steps = demo.gradient_descent.steps
    late, half = steps * 7 // 12, steps // 2
    lines = [
        _table_row("", *(f"{run.name}, {run.settings}" for run in demo.runs), width=26),
        _table_row("", *("seen", "theory") * len(demo.runs)),
    ]

    def add(label: str, seen: Callable[[EdgeRun], str], theory: Callable[[EdgeRun], str] = lambda run: "") -> None:
        lines.append(_table_row(label, *(cell for run in demo.runs for cell in (seen(run), theory(run)))))

    add("threshold", lambda run: _number(run.rows[-1]["threshold"]), lambda run: _number(run.theory))
    add(
        f"mean normalized sharpness, steps {late} to {steps}",
        lambda run: _number(run.mean("normalized_sharpness", late)),
        lambda run: f"< {run.theory:g}" if run.minibatches else _number(run.theory),
    )
    add(
        f"mean edge ratio, steps {half} to {steps}",
        lambda run: _number(run.mean("edge_ratio", half)),
        lambda run: "< 1" if run.minibatches else _number(1.0),
    )
    add(
        f"mean lr * batch sharpness, steps {half} to {steps}",
        lambda run: _number(run.mean_batch_sharpness(half)) if run.minibatches else "",
        lambda run: f"{run.theory:.3f} **" if run.minibatches else "",
    )
    add("edge ratio of the first reading", lambda run: _number(run.first_edge_ratio), lambda run: "< 1")
    add("first step with an edge ratio of 1 or more", lambda run: _number(run.steps_to_edge))
    add("readings", lambda run: str(len(run.measured)))
    add("products per reading (median)", lambda run: _number(run.products))
    add("time of readings / time of training *", lambda run: "-" if run.overhead is None else f"{run.overhead:.0%}")
    add("seconds in all", lambda run: f"{run.seconds:.1f}")
    lines += [
        "*  so many readings are for the figure; at the default, they keep to 5% of the time",
        "** with minibatches this marks the edge, to some 25%; the edge ratio stays below 1",
    ]
    return "\n".join(lines)


def _table_row(label: str, *cells: str, width: int = 12) -> str:
    return f"{label:<46}" + "  ".join(f"{cell:>{width}}" for cell in cells).rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


class _TanhNet(LightningModule):
    def __init__(self, case: _Case) -> None:
        super().__init__()
        self._case = case
        self.net = nn.Sequential(
            nn.Linear(64, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, 10)
        ).double()
        self.losses: list[tuple[int, float]] = []

    def curvature_loss(self, batch: Batch) -> Tensor:
        images, targets = batch
        loss: Tensor = 0.5 * (self.net(images) - targets).square().sum(dim=1).mean()
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.curvature_loss(batch)
        self.losses.append((batch_idx, loss.item()))
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self._case.optimizer(self.net.parameters())
        warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self._case.warm_up))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


class _Bar(TQDMProgressBar):
    """One bar for one run, with the edge ratio in it."""

    def __init__(self, title: str, monitor: EdgeOfStabilityMonitor) -> None:
        super().__init__(refresh_rate=_READ_EVERY)
        self._title, self._monitor = title, monitor

    @property
    def train_description(self) -> str:
        return self._title

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.train_description)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        readings = self._monitor.readings
        ratio = readings[-1].edge_ratio if readings else None
        return {} if ratio is None else {"edge_ratio": f"{ratio:.2f}"}


class _AboveTheBar(logging.Handler):
    """Writes messages above the progress bar, wrapped."""

    def emit(self, record: logging.LogRecord) -> None:
        width = min(shutil.get_terminal_size().columns, 120)
        tqdm.write(textwrap.fill(record.getMessage(), width, subsequent_indent="  "))


@contextmanager
def _only_our_messages() -> Iterator[None]:
    """Leave out what Lightning tells of devices, loggers and workers; show what the monitor says."""
    # Of the logger under three package names, the one that was imported last speaks for all.
    theirs, ours = rank_zero.log, logging.getLogger("pytorch_lightning.eos_monitor")
    handler, before = _AboveTheBar(), (theirs.level, ours.level, ours.propagate)
    theirs.setLevel(logging.WARNING)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(handler)
    try:
        with warnings.catch_warnings():
            for message in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*"):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        ours.removeHandler(handler)
        theirs.setLevel(before[0])
        ours.setLevel(before[1])
        ours.propagate = before[2]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep to one thread: on a busy machine, two that wait for each other took up to twenty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Batches(Dataset[Batch]):
    """A batch for each step, in passes over the data, shuffled unless it is one batch: one epoch, one progress bar."""

    def __init__(self, data: Batch, batch_size: int | None, steps: int, seed: int) -> None:
        self._data = data
        samples = len(data[0])
        if batch_size is None:
            self._picked = [torch.arange(samples)] * steps
        else:
            generator = torch.Generator().manual_seed(seed)
            passes = (torch.split(torch.randperm(samples, generator=generator), batch_size) for _ in count())
            self._picked = list(islice(chain.from_iterable(passes), steps))

    def __len__(self) -> int:
        return len(self._picked)

    def __getitem__(self, index: int) -> Batch:
        images, targets = self._data
        picked = self._picked[index]
        return images[picked], targets[picked]


def _digits(centred: bool) -> Batch:
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images[:_SAMPLES], dtype=torch.float64)
    x = x - (x.mean(dim=0) if centred else x.mean())
    return x / x.std(), nn.functional.one_hot(torch.as_tensor(labels[:_SAMPLES]), 10).double()


def _train(case: _Case, folder: Path, steps: int, seed: int) -> EdgeRun:
    monitor = EdgeOfStabilityMonitor(
        every_n_steps=case.read_every,
        probe=Probe(samples=case.probe_samples, full_batch=case.batch_size is None),
        solver=Solver(rtol=case.rtol, seed=seed),
    )
    logger = TensorBoardLogger(folder, name=case.name.replace(" ", "_").lower(), default_hp_metric=False)
    tqdm.write(f"\n{case.name}, {case.settings}, torch's defaults otherwise")
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]), _one_thread(), _only_our_messages():
        torch.manual_seed(seed)
        module = _TanhNet(case)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            log_every_n_steps=min(case.read_every, steps),
            logger=logger,
            callbacks=[monitor, _Bar(case.name, monitor)],
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        batches = _Batches(_digits(case.centred), case.batch_size, steps, seed)
        loader: DataLoader[Batch] = DataLoader(batches, batch_size=None)
        trainer.fit(module, loader)
    seconds = time.perf_counter() - began
    place = Path(logger.log_dir)
    with (place / f"{monitor.name}_readings.jsonl").open(encoding="utf-8") as file:
        rows = tuple(json.loads(line) for line in file)
    return EdgeRun(
        case.name,
        case.settings,
        case.theory,
        steps,
        rows,
        tuple(module.losses),
        seconds,
        place,
        minibatches=case.batch_size is not None,
    )
