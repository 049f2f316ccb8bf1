"""Gradient descent, AdamW and minibatch SGD on scikit-learn's digits, each at its own edge of stability."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  # the figures are half of the demo: miss it before the runs, not after
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from eos_monitor.callbacks.edge_of_stability import EdgeOfStabilityMonitor
from eos_monitor.dashboard.figures import normalized_batch_sharpness, runs_figure
from eos_monitor.lab.progress_bar import RunBar, only_our_messages
from eos_monitor.lab.recipes import READ_EVERY, RECIPES, SAMPLES, Recipe
from eos_monitor.lab.tanh_net import Batch, StepBatches, TanhNet
from eos_monitor.readings.settings import Probe, Solver


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
    gradient_descent, adamw, minibatch_sgd = (_train(recipe, folder, steps, seed) for recipe in RECIPES)
    demo = EdgeDemo(gradient_descent, adamw, minibatch_sgd, folder / "edge_of_stability.png")
    panels = [(f"{run.name}, {run.settings}", run.rows, run.losses) for run in demo.runs]
    runs_figure(panels).savefig(demo.figure, dpi=110)
    return demo


def edge_table(demo: EdgeDemo) -> str:
    """Return a table of what was seen beside what theory says."""
    steps = demo.gradient_descent.steps
    late = steps * 7 // 12
    half = steps // 2
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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep to one thread: on a busy machine, two that wait for each other took up to twenty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _digits(centred: bool) -> Batch:
    """Return the first 1000 digits with their one-hot labels, centred pixel by pixel or as a whole."""
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images[:SAMPLES], dtype=torch.float64)
    x = x - (x.mean(dim=0) if centred else x.mean())
    return x / x.std(), nn.functional.one_hot(torch.as_tensor(labels[:SAMPLES]), 10).double()


def _train(recipe: Recipe, folder: Path, steps: int, seed: int) -> EdgeRun:
    monitor = EdgeOfStabilityMonitor(
        every_n_steps=recipe.read_every,
        probe=Probe(samples=recipe.probe_samples, full_batch=recipe.batch_size is None),
        solver=Solver(rtol=recipe.rtol, seed=seed),
    )
    logger = TensorBoardLogger(folder, name=recipe.name.replace(" ", "_").lower(), default_hp_metric=False)
    tqdm.write(f"\n{recipe.name}, {recipe.settings}, torch's defaults otherwise")
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]), _one_thread(), only_our_messages():
        torch.manual_seed(seed)
        module = TanhNet(recipe.optimizer, recipe.warm_up)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            log_every_n_steps=min(recipe.read_every, steps),
            logger=logger,
            callbacks=[monitor, RunBar(recipe.name, monitor, READ_EVERY)],
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        batches = StepBatches(_digits(recipe.centred), recipe.batch_size, steps, seed)
        loader: DataLoader[Batch] = DataLoader(batches, batch_size=None)
        trainer.fit(module, loader)
    seconds = time.perf_counter() - began
    place = Path(logger.log_dir)
    with (place / f"{monitor.name}_readings.jsonl").open(encoding="utf-8") as file:
        rows = tuple(json.loads(line) for line in file)
    return EdgeRun(
        recipe.name,
        recipe.settings,
        recipe.theory,
        steps,
        rows,
        tuple(module.losses),
        seconds,
        place,
        minibatches=recipe.batch_size is not None,
    )
