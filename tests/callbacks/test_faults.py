"""What goes wrong in real runs: each fault leaves the run as it would be without the monitor, and is told once."""

import importlib
import signal
import sys
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eos_monitor import EdgeOfStabilityMonitor, Probe, Verdict
from tests.callbacks.runs import CLASSES, FEATURES, NAMESPACES, differences, everything, make_logger, mlp

STEPS = 8


@dataclass(frozen=True)
class Fault:
    """A run with something wrong in it, and what the monitor should have made of it."""

    expect: Callable[[Any, list[str]], None]  # (monitor, its warnings)
    step: Callable[[Any, Any, int], Any] | None = None
    net: Callable[[], nn.Module] = mlp
    prepare: Callable[[Any], None] | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda m: torch.optim.SGD(
        [p for p in m.parameters() if p.requires_grad], lr=0.1
    )
    batches: Callable[[], list[Any]] | None = None
    loader: Callable[[list[Any]], Any] = lambda batches: torch.utils.data.DataLoader(batches, batch_size=None)
    monitor: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    dies: type[BaseException] | None = None  # the run itself ends so, with and without the monitor


def samples(n: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, FEATURES, generator=g), torch.randint(CLASSES, (n,), generator=g)


def default_batches() -> list[Any]:
    return [samples(seed=i) for i in range(STEPS)]


def default_step(module: Any, batch: Any, step: int) -> torch.Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


# ---------------------------------------------------------------- what to expect


def measures(monitor: Any, told: list[str]) -> None:
    assert told == []
    assert sum(reading.edge_ratio is not None for reading in monitor.readings) >= 3
    assert all(reading.converged for reading in monitor.readings)


def gives_up(*parts: str) -> Callable[[Any, list[str]], None]:
    def expect(monitor: Any, told: list[str]) -> None:
        assert len(told) == 2, told
        assert all(part in told[0] for part in parts), told[0]
        assert "stops measuring" in told[1]
        assert not any(reading.edge_ratio is not None for reading in monitor.readings)

    return expect


def skips(part: str) -> Callable[[Any, list[str]], None]:
    def expect(monitor: Any, told: list[str]) -> None:
        assert len(told) == 1, told
        assert part in told[0]
        assert sum(reading.edge_ratio is not None for reading in monitor.readings) >= 3

    return expect


def reads(n: int) -> Callable[[Any, list[str]], None]:
    def expect(monitor: Any, told: list[str]) -> None:
        assert told == []
        assert len(monitor.readings) == n

    return expect


def has_no_edge(part: str) -> Callable[[Any, list[str]], None]:
    def expect(monitor: Any, told: list[str]) -> None:
        assert told == []
        assert {reading.edge_ratio for reading in monitor.readings} == {None}
        assert part in monitor.report()

    return expect


def says_nothing(monitor: Any, told: list[str]) -> None:
    assert told == []
    assert monitor.readings == []


def diverges(monitor: Any, told: list[str]) -> None:
    assert monitor.verdict is Verdict.DIVERGING
    assert monitor.readings[0].edge_ratio is not None


def notes(*parts: str) -> Callable[[Any, list[str]], None]:
    def expect(monitor: Any, told: list[str]) -> None:
        measures(monitor, told)
        assert all(any(part in note for note in monitor.readings[0].notes) for part in parts)

    return expect


# ---------------------------------------------------------------- faults


def nan_at(step: int, value: float) -> Callable[[Any, Any, int], Any]:
    def loss(module: Any, batch: Any, n: int) -> torch.Tensor:
        return default_step(module, batch, n) * (value if n >= step else 1.0)

    return loss


def constant(module: Any, batch: Any, step: int) -> torch.Tensor:
    return torch.zeros((), requires_grad=True) * 1.0


def sometimes_none(module: Any, batch: Any, step: int) -> Any:
    return None if step % 2 else default_step(module, batch, step)


def as_dictionary(module: Any, batch: Any, step: int) -> Any:
    return {"loss": default_step(module, batch, step), "extra": object()}


Point = namedtuple("Point", "x y")


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "record"


class Graph:
    """Like a batch of graphs: tensors behind attributes, with ``to``."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: Any, **kwargs: Any) -> "Graph":
        return Graph(self.x.to(device), self.y.to(device))


def from_attributes(module: Any, batch: Any, step: int) -> torch.Tensor:
    return F.cross_entropy(module.net(batch.x), batch.y)


def from_nest(module: Any, batch: Any, step: int) -> torch.Tensor:
    return F.cross_entropy(module.net(batch["inputs"][0]["x"]), batch["targets"][0])


class Counted(torch.utils.data.IterableDataset):
    """Every item that is drawn is counted."""

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self) -> Any:
        for batch in default_batches():
            self.drawn += 1
            yield batch


class Embedded(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table((x[:, 0].abs() * 3).long().clamp(max=9)).tanh())


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(FEATURES, CLASSES, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex64) @ self.phase).abs()


class InfiniteCurvature(torch.autograd.Function):
    """The identity, whose second derivative is NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return PoisonedGradient.apply(g)


class PoisonedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * float("nan")


def poisoned(module: Any, batch: Any, step: int) -> torch.Tensor:
    return F.cross_entropy(InfiniteCurvature.apply(module.net(batch[0])), batch[1])


def out_of_memory(module: Any, batch: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("tried to allocate 1 PiB")


def freeze_first(module: Any) -> None:
    module.net[0].requires_grad_(False)


def unfreeze_later(module: Any, batch: Any, step: int) -> torch.Tensor:
    if step == 3:
        module.net[0].requires_grad_(True)
    return default_step(module, batch, step)


def not_a_scalar(module: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def a_float(module: Any, batch: Any) -> Any:
    return 1.0


FAULTS: dict[str, Fault] = {
    "nothing": Fault(measures),
    "nan-loss-later": Fault(diverges, step=nan_at(3, float("nan"))),
    "infinite-loss-later": Fault(diverges, step=nan_at(3, float("inf"))),
    "nan-loss-from-the-start": Fault(gives_up("finite loss", "nan"), step=nan_at(0, float("nan"))),
    "loss-independent-of-the-parameters": Fault(gives_up("uses none of them"), step=constant),
    "loss-is-a-vector": Fault(gives_up("scalar", "(8,)"), monitor={"loss_fn": not_a_scalar}),
    "loss-is-a-float": Fault(gives_up("scalar", "float"), monitor={"loss_fn": a_float}),
    "training-step-returns-none": Fault(skips("training_step to return a loss"), step=sometimes_none),
    "training-step-returns-a-dictionary": Fault(measures, step=as_dictionary),
    "batch-is-a-dictionary": Fault(
        measures,
        batches=lambda: [{"x": x, "y": y} for x, y in default_batches()],
        step=lambda m, b, n: default_step(m, (b["x"], b["y"]), n),
    ),
    "batch-is-a-dataclass": Fault(
        measures, batches=lambda: [Record(*b) for b in default_batches()], step=from_attributes
    ),
    "batch-is-a-namedtuple": Fault(
        measures, batches=lambda: [Point(*b) for b in default_batches()], step=from_attributes
    ),
    "batch-is-nested": Fault(
        measures,
        batches=lambda: [{"inputs": [{"x": x}, "text"], "targets": (y, None)} for x, y in default_batches()],
        step=from_nest,
    ),
    "batch-is-graph-like": Fault(
        measures, batches=lambda: [Graph(*b) for b in default_batches()], step=from_attributes
    ),
    "batch-size-changes": Fault(measures, batches=lambda: [samples(n) for n in (8, 3, 5, 1, 8, 2, 7, 4)]),
    "batch-is-empty-once": Fault(
        skips("at least one sample"),
        batches=lambda: [default_batches()[0], samples(0), *default_batches()[2:]],
        step=lambda m, b, n: default_step(m, b, n) if len(b[0]) else None,
        monitor={"probe": "batch"},
    ),
    "no-trainable-parameter": Fault(
        gives_up("trainable parameters", "got none"),
        prepare=lambda m: m.requires_grad_(False),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        step=lambda m, b, n: default_step(m, (b[0].clone().requires_grad_(), b[1]), n),
    ),
    "frozen-parameters": Fault(measures, prepare=freeze_first),
    "unfrozen-later": Fault(
        measures, prepare=freeze_first, step=unfreeze_later, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)
    ),
    "unused-parameters": Fault(notes("not used by the loss"), prepare=lambda m: setattr(m, "spare", nn.Linear(8, 8))),
    "parameters-outside-the-optimizer": Fault(
        measures, optimizer=lambda m: torch.optim.SGD(m.net[3].parameters(), lr=0.1)
    ),
    "sparse-embedding": Fault(measures, net=lambda: Embedded(sparse=True)),
    "dense-embedding": Fault(measures, net=lambda: Embedded(sparse=False)),
    "complex-parameters": Fault(gives_up("real floating-point", "complex64"), net=Complex),
    "nan-products": Fault(gives_up("finite matrix-vector products"), step=poisoned),
    "out-of-memory": Fault(gives_up("OutOfMemoryError", "1 PiB"), monitor={"loss_fn": out_of_memory}),
    "cadence-longer-than-the-run": Fault(reads(1), monitor={"every_n_steps": 100}),
    "limit-train-batches": Fault(reads(3), trainer={"limit_train_batches": 2}),  # two steps and the end
    "switched-off": Fault(says_nothing, monitor={"enabled": False}),
    "fast-dev-run": Fault(reads(2), trainer={"fast_dev_run": True, "logger": None}),
    "gradient-clipping-beyond-the-edge": Fault(
        measures,
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=50.0),
        trainer={"gradient_clip_val": 0.1},
    ),
    "learning-rate-zero": Fault(
        has_no_edge("learning rate of 0"),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0),
    ),
}


def make_module(pl: Any, fault: Fault) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.steps = fault.net(), 0
            if fault.prepare is not None:
                fault.prepare(self)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            step, self.steps = self.steps, self.steps + 1
            return (fault.step or default_step)(self, batch, step)

        def configure_optimizers(self) -> Any:
            return fault.optimizer(self)

    return Module()


def run(namespace: str, fault: Fault, folder: Path, monitor: Any) -> tuple[dict[str, Any], list[str]]:
    pl = importlib.import_module(namespace)
    torch.manual_seed(0)
    module, logger = make_module(pl, fault), make_logger(pl)
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": logger,
        "callbacks": [monitor] if monitor else [],
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **fault.trainer,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(**settings)
        trainer.fit(module, fault.loader((fault.batches or default_batches)()))
    rows = [row for row in logger.rows if not any(key.startswith("eos/") for key in row[1])]
    return everything(trainer, module, rows), [str(w.message) for w in caught if "eos_monitor" in str(w.message)]


BOTH = [NAMESPACES[0], pytest.param(NAMESPACES[1], marks=pytest.mark.slow)]


@pytest.mark.parametrize("namespace", BOTH)
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_told_and_harms_nothing(namespace: str, name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    without, _ = run(namespace, fault, tmp_path, None)
    monitor = EdgeOfStabilityMonitor(**{"every_n_steps": 1, "probe": Probe(samples=8), "alerts": (), **fault.monitor})
    compared, told = run(namespace, fault, tmp_path, monitor)
    assert differences(without, compared) == []
    fault.expect(monitor, told)


# ---------------------------------------------------------------- the rows that need more than a table can say

pl: Any = None


@pytest.fixture(params=BOTH)
def package(request: Any, monkeypatch: Any) -> Any:
    """The Lightning package of the test, also as ``pl``."""
    monkeypatch.setattr(sys.modules[__name__], "pl", importlib.import_module(request.param))
    return pl


def fit(module: Any, folder: Path, callbacks: list[Any], loader: Any = None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "callbacks": callbacks,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    trainer = pl.Trainer(**{**defaults, **settings})
    data = loader if loader is not None else torch.utils.data.DataLoader(default_batches(), batch_size=None)
    trainer.fit(module, data)
    return trainer


def plain_module(**kwargs: Any) -> Any:
    return make_module(pl, Fault(measures, **kwargs))


def test_iterable_dataset_is_not_consumed(package: Any, tmp_path: Path) -> None:
    data = Counted()
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, probe=Probe(samples=24), alerts=())
    trainer = fit(plain_module(), tmp_path, [monitor], torch.utils.data.DataLoader(data, batch_size=None))
    assert data.drawn == trainer.global_step == STEPS
    assert len(monitor.readings) == STEPS + 1 - 2  # the third batch fills the probe


def test_two_monitors_at_once(package: Any, tmp_path: Path) -> None:
    first = EdgeOfStabilityMonitor(every_n_steps=1, probe=Probe(samples=8), alerts=())
    second = EdgeOfStabilityMonitor(every_n_steps=2, probe=Probe(samples=8), alerts=(), name="other")
    trainer = fit(plain_module(), tmp_path, [first, second], logger=pl.loggers.CSVLogger(tmp_path))
    assert (len(first.readings), len(second.readings)) == (9, 5)
    assert first.state_key != second.state_key
    for a, b in zip(first.readings[::2], second.readings, strict=True):
        assert a.edge_ratio == pytest.approx(b.edge_ratio, rel=1e-3)  # each within rtol² of the truth
    assert (Path(trainer.logger.log_dir) / "other_readings.jsonl").exists()


def test_attached_to_a_run_in_its_middle(package: Any, tmp_path: Path) -> None:
    module = plain_module()
    trainer = fit(module, tmp_path, [])
    monitor = EdgeOfStabilityMonitor(every_n_steps=4, probe=Probe(samples=8), alerts=())
    trainer.callbacks.append(monitor)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, torch.utils.data.DataLoader(default_batches(), batch_size=None))
    assert [reading.step for reading in monitor.readings] == [8, 12, 16]


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_other_entry_points_measure_nothing(package: Any, entry: str, tmp_path: Path) -> None:
    class Evaluated(type(plain_module())):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).sum()

        test_step = predict_step = validation_step

    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[monitor], enable_progress_bar=False, default_root_dir=tmp_path
    )
    getattr(trainer, entry)(Evaluated(), torch.utils.data.DataLoader(default_batches(), batch_size=None))
    assert monitor.readings == []


def test_sanity_checking_measures_nothing(package: Any, tmp_path: Path) -> None:
    class Validated(type(plain_module())):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(len(monitor.readings))

    seen: list[int] = []
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, probe=Probe(samples=8), alerts=())
    loader = torch.utils.data.DataLoader(default_batches(), batch_size=None)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    trainer.fit(Validated(), loader, loader)
    assert seen == [0, 0] + [STEPS] * STEPS


def interrupted(module: Any, batch: Any) -> torch.Tensor:
    raise KeyboardInterrupt


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Give SIGINT back, which Lightning ignores from an interrupt on."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_keyboard_interrupt_in_a_reading_is_the_users(package: Any, tmp_path: Path) -> None:
    """It ends the run, as it would anywhere else, and the module is as it was."""
    module = plain_module()
    before = {name: p.clone() for name, p in module.named_parameters()}
    attributes = dict(module.__dict__)
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, probe=Probe(samples=8), alerts=(), loss_fn=interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, tmp_path, [monitor])
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert module._modules is attributes["_modules"]
    assert module.training


def test_a_slow_reading_is_repaid_before_the_next(package: Any, tmp_path: Path) -> None:
    """Against the clock of the schedule itself, not against a time that this machine would have to hold."""

    def slow(module: Any, batch: Any) -> torch.Tensor:
        time.sleep(0.005)
        return default_step(module, batch, 0)

    monitor = EdgeOfStabilityMonitor(max_overhead=0.05, probe=Probe(samples=8), alerts=(), loss_fn=slow)
    fit(plain_module(), tmp_path, [monitor], max_epochs=4)
    # A reading takes some 0.03 s and so buys 0.6 s of training; 32 steps take less.
    assert len(monitor.readings) == 1


@pytest.mark.parametrize("how", ["full-disk", "folder-is-a-file"])
def test_a_log_folder_that_cannot_be_written_costs_only_the_file(
    package: Any, how: str, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "logs"
    if how == "full-disk":

        def full(path: Path, row: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("eos_monitor.callbacks.outputs.append_jsonl", full)
    else:
        folder.write_text("in the way")
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, probe=Probe(samples=8), alerts=())
    with pytest.warns(UserWarning, match=r"output \((file|figure)\) failed") as caught:
        trainer = fit(plain_module(), folder, [monitor])
    assert len([w for w in caught if "(file)" in str(w.message)]) == 1
    assert trainer.global_step == STEPS
    assert len(monitor.readings) == STEPS + 1


def test_barebones_trainer_is_told_once(package: Any, tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    trainer = pl.Trainer(
        barebones=True, max_epochs=1, accelerator="cpu", callbacks=[monitor], default_root_dir=tmp_path
    )
    with pytest.warns(UserWarning, match="barebones"):
        trainer.fit(plain_module(), torch.utils.data.DataLoader(default_batches(), batch_size=None))
    assert monitor.readings == []


def test_lazily_created_parameters(package: Any, tmp_path: Path) -> None:
    module = plain_module(net=lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, CLASSES)))
    module.configure_optimizers = lambda: torch.optim.SGD(module.net[2].parameters(), lr=0.1)
    module.net(samples()[0])
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, probe=Probe(samples=8), alerts=())
    fit(module, tmp_path, [monitor])
    assert len(monitor.readings) == STEPS + 1


@pytest.mark.parametrize("tuner", ["lr_find", "scale_batch_size"])
def test_tuners_run_their_fits_unwatched(package: Any, tuner: str, tmp_path: Path) -> None:
    tuners = importlib.import_module(f"{package.__name__}.tuner")

    class Tuned(type(plain_module())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lr, self.batch_size = 0.1, 2

        def train_dataloader(self) -> Any:
            x, y = samples(64)
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=self.batch_size)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    monitor = EdgeOfStabilityMonitor(every_n_steps=1, probe=Probe(samples=8), alerts=())
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    module = Tuned()
    settings = {"num_training": 10} if tuner == "lr_find" else {"max_trials": 2, "steps_per_trial": 2}
    getattr(tuners.Tuner(trainer), tuner)(module, **settings)
    trainer.fit(module)
    assert monitor.readings[-1].step == trainer.global_step
    assert monitor.readings[-1].edge_ratio is not None
