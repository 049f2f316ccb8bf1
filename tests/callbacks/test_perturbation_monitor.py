"""The twin-run monitor: the run stays as it is, and what is told is what a second run of one's own would show."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eos_monitor import EdgeOfStabilityMonitor, Probe, Verdict
from eos_monitor.callbacks.observer import Observers
from eos_monitor.callbacks.perturbation_monitor import PerturbationMonitor
from eos_monitor.callbacks.reading_context import ReadingContext
from eos_monitor.perturbation import relative_l1
from tests.callbacks.runs import CLASSES, FEATURES, NAMESPACES, Case, differences, logs_of, mlp, run

_SETTINGS: dict[str, Any] = {"every_n_steps": 2, "probe": Probe(samples=16)}
CASES = {
    "alone": Case(),
    "batchnorm-dropout-onecycle": Case(
        net=lambda: mlp(norm=True, dropout=0.3),
        metrics=True,
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=16),
    ),
    "adamw-accumulate-bf16": Case(
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.99)),  # young for 10 steps
        net=lambda: mlp(dropout=0.3),
        trainer={"accumulate_grad_batches": 2, "precision": "bf16-mixed", "max_epochs": 4},
    ),
    "with-a-host-resumed": Case(
        callbacks=lambda pl, folder: [EdgeOfStabilityMonitor(**_SETTINGS, alerts=())], resume=True
    ),
}


# Each case once in the quick suite, and all of it in the slow one.
_QUICK = {("alone", "mode"), ("batchnorm-dropout-onecycle", "last-bit"), ("adamw-accumulate-bf16", "mode")}


@pytest.mark.parametrize(
    ("namespace", "name", "perturbation"),
    [
        pytest.param(
            namespace,
            name,
            perturbation,
            marks=[] if namespace == NAMESPACES[0] and (name, perturbation) in _QUICK else [pytest.mark.slow],
        )
        for namespace in NAMESPACES
        for name in CASES
        for perturbation in ("last-bit", "mode")
    ],
)
def test_run_is_bit_identical(namespace: str, name: str, perturbation: Any, tmp_path: Path) -> None:
    case = CASES[name]
    alone = case if name != "with-a-host-resumed" else Case(resume=True)
    without = run(namespace, alone, tmp_path / "without", lambda pl: None)
    made: list[PerturbationMonitor] = []

    def make(pl: Any) -> PerturbationMonitor:
        made.append(PerturbationMonitor(at_steps=[2, 3, 18], steps=5, perturbation=perturbation, **_SETTINGS))
        return made[-1]

    monitored = run(namespace, case, tmp_path / "with", make)
    rows = [row for row in monitored["compared"].pop("rows") if not any("/verdict" in key for key in row[1])]
    before = without["compared"].pop("rows")
    assert differences(before, rows) == []
    assert differences(without["compared"], monitored["compared"]) == []
    # The first of the two fits of a resumed run is the other monitor's.
    runs = {step: twins for monitor in made for step, twins in monitor.runs.items()}
    assert len(runs) >= (3 if case.resume else 1)
    assert all(twins.steps == 5 for twins in runs.values())


def fit(folder: Path, *callbacks: Any, lr: float = 0.1, epochs: int = 5, scheduled: bool = False) -> tuple[Any, Any]:
    pl = importlib.import_module("pytorch_lightning")
    torch.manual_seed(0)

    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp().double()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9)
            if not scheduled:
                return optimizer
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * 4)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, FEATURES, generator=g, dtype=torch.float64), torch.randint(CLASSES, (32,), generator=g)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=pl.loggers.CSVLogger(folder),
        callbacks=list(callbacks),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, loader)
    return trainer, module


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "onecycle"])
def test_copies_take_the_steps_that_the_run_takes(scheduled: bool, tmp_path: Path) -> None:
    """The probe is the epoch's batches in order, so that the unperturbed copy is the run itself, schedule included."""
    losses: list[float] = []
    pl = importlib.import_module("pytorch_lightning")

    class Losses(pl.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    monitor = PerturbationMonitor(at_steps=[4], steps=10, every_n_steps=4, probe=Probe(samples=32), name="twins")
    trainer, _ = fit(tmp_path, Losses(), monitor, scheduled=scheduled)
    [(step, twins)] = monitor.runs.items()
    assert step == 4
    # The same operations on the same numbers in double precision
    assert twins.losses == pytest.approx(losses[4:14], rel=1e-12)
    [row] = [
        json.loads(line) for line in (logs_of(Path(trainer.log_dir)) / "twins_readings.jsonl").read_text().splitlines()
    ]
    assert (row["step"], row["verdict"], row["steps"]) == (4, twins.verdict, 10)
    assert row["gain"] == pytest.approx(twins.gain)


def test_gain_is_that_of_two_runs_by_hand(tmp_path: Path) -> None:
    """A run moved along a random direction, against a second loop that shares nothing with the monitor."""
    start: dict[str, Any] = {}
    pl = importlib.import_module("pytorch_lightning")

    class Start(pl.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 4:
                start["p"] = [p.detach().clone() for p in pl_module.parameters()]
                start["m"] = [trainer.optimizers[0].state[p]["momentum_buffer"].clone() for p in pl_module.parameters()]

    monitor = PerturbationMonitor(
        at_steps=[4], steps=6, every_n_steps=4, probe=Probe(samples=32), perturbation="random"
    )
    fit(tmp_path, Start(), monitor)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, FEATURES, generator=g, dtype=torch.float64), torch.randint(CLASSES, (32,), generator=g)

    def loop(move: float) -> torch.Tensor:
        params = [p.clone().requires_grad_() for p in start["p"]]
        n, size = sum(p.numel() for p in params), torch.cat([p.detach().flatten() for p in params]).norm()
        direction = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        parts = torch.split(direction * move * size / direction.norm(), [p.numel() for p in params])
        with torch.no_grad():
            for p, part in zip(params, parts, strict=True):
                p += part.view_as(p)
        momenta = [m.clone() for m in start["m"]]
        for t in range(6):
            batch = slice(8 * (t % 4), 8 * (t % 4) + 8)
            hidden = (x[batch] @ params[0].T + params[1]).tanh()
            loss = F.cross_entropy(hidden @ params[2].T + params[3], y[batch])
            gradients = torch.autograd.grad(loss, params)
            with torch.no_grad():
                for p, m, gradient in zip(params, momenta, gradients, strict=True):
                    m.mul_(0.9).add_(gradient)
                    p -= 0.1 * m
        return torch.cat([p.detach().flatten() for p in params])

    one, other = loop(0.0), loop(1e-9)
    # Two float64 runs 1e-9 apart: their distance carries rounding of about 1e-16 / 1e-9.
    [twins] = monitor.runs.values()
    assert twins.relative_l1[-1] == pytest.approx(relative_l1(one, other), rel=1e-5)


def test_each_step_is_measured_once_and_restraint_when_it_begins() -> None:
    monitor = PerturbationMonitor(at_steps=[10, 20], steps=1)
    taken: list[int] = []
    monitor._outputs = None  # type: ignore[assignment]

    class Trainer:
        is_global_zero = False  # decides, and does not run

    def meet(step: int, verdict: Verdict) -> None:
        done = monitor._done
        monitor.measure(ReadingContext(Trainer(), None, None, (), [], step, None, None, verdict, lambda n: None))  # type: ignore[arg-type]
        if monitor._done != done:
            taken.append(step)

    restrained, edge = Verdict.RESTRAINED, Verdict.EDGE
    for step, verdict in [(5, edge), (12, edge), (15, edge), (25, edge), (30, restrained), (35, restrained)]:
        meet(step, verdict)
    state = monitor.state_dict()
    monitor = PerturbationMonitor(at_steps=[10, 20], steps=1)
    monitor.load_state_dict(state)
    for step, verdict in [(40, restrained), (45, edge), (50, restrained)]:
        meet(step, verdict)
    assert taken == [12, 25, 30, 50]
    assert monitor.runs == {}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"perturbation": "all"}, "perturbation"),
        ({"steps": 0}, "steps"),
        ({"at_steps": [-1]}, "at_steps"),
        ({"k": 0.0}, "`k`"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_arguments_out_of_range_are_named(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        PerturbationMonitor(**settings)


def test_synchronized_norm_is_left_out_with_several_processes() -> None:
    monitor = PerturbationMonitor(at_steps=[1])

    class Trainer:
        world_size, lightning_module = 2, nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))

    with pytest.warns(UserWarning, match="Synchronized batch normalization"):
        monitor.turn_off_if_synchronized(Trainer())
    Observers([monitor]).measure(None)  # type: ignore[arg-type]
