"""Nothing of ours ends a fit: whatever fails in a hook, the run is the one without the monitor, and it is told."""

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eos_monitor import (
    CFLMonitor,
    EdgeOfStabilityMonitor,
    PerturbationMonitor,
    Probe,
    StabilityActions,
    register_critical_curvature,
)
from eos_monitor.callbacks.cfl_monitor import CFLMonitor as Layers
from eos_monitor.callbacks.monitored_fit import MonitoredFit
from eos_monitor.callbacks.outputs import RunOutputs
from eos_monitor.callbacks.reading_context import ReadingContext
from eos_monitor.callbacks.schedulers import TrainerSchedulers
from eos_monitor.callbacks.trainer_gauge import TrainerGauge
from eos_monitor.forecast.tracked_reading import TrackedReading
from eos_monitor.limits.thresholds import _RULES
from eos_monitor.monitor.engine import Engine
from eos_monitor.readings.samples import ProbeSamples
from eos_monitor.readings.schedule import Schedule
from eos_monitor.verdicts.detector import InstabilityDetector
from eos_monitor.verdicts.projector import UpdateProjector
from eos_monitor.verdicts.steps import StepBuffer
from tests.callbacks import distributed_run
from tests.callbacks.runs import CLASSES, NAMESPACES, Case, differences, mlp, run
from tests.launching import run_script

PLACES: list[tuple[type[Any], str]] = [
    (MonitoredFit, "__init__"),
    (RunOutputs, "__init__"),
    (StepBuffer, "__init__"),
    (TrainerSchedulers, "__init__"),
    (TrainerSchedulers, "highest_rate"),
    (Engine, "follow"),
    (Engine, "due"),
    (Engine, "measure"),
    (Engine, "add_reading"),
    (Engine, "add_step"),
    (Engine, "affordable"),
    (Engine, "report"),
    (Schedule, "measured"),
    (TrainerGauge, "collect"),
    (TrainerGauge, "measure"),
    (TrackedReading, "__init__"),
    (TrackedReading, "edge_ratio"),
    (StepBuffer, "begin"),
    (StepBuffer, "end"),
    (StepBuffer, "add_loss"),
    (StepBuffer, "flush"),
    (InstabilityDetector, "update"),
    (MonitoredFit, "_open"),
    (MonitoredFit, "_begin_update"),
    (MonitoredFit, "_write"),
    (MonitoredFit, "_announce"),
    (RunOutputs, "row"),
    (RunOutputs, "finish"),
    (StabilityActions, "begin"),
    (StabilityActions, "keep"),
    (StabilityActions, "before_step"),
    (StabilityActions, "before_update"),
    (StabilityActions, "before_optimizer_step"),
    (StabilityActions, "measured"),
    (StabilityActions, "finish"),
    (Layers, "begin"),
    (Layers, "measure"),
    (Layers, "settle"),
    (Layers, "write"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(NAMESPACES[1], CASE, tmp_path_factory.mktemp("plain") / "run", lambda pl: None)["compared"]


CASE = Case(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.5))


@pytest.mark.parametrize(("cls", "name"), PLACES, ids=[f"{cls.__name__}.{name}" for cls, name in PLACES])
@pytest.mark.parametrize("after", [0, 2], ids=["at-once", "later"])
def test_what_fails_in_a_hook_stays_there(cls: Any, name: str, after: int, plain: Any, tmp_path: Path) -> None:
    calls = 0
    real = getattr(cls, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise ArithmeticError("on purpose")
        return real(*args, **kwargs)

    def callbacks(pl: Any) -> list[Any]:
        monitor = EdgeOfStabilityMonitor(3, probe=Probe(samples=16), alerts=())
        return [monitor, CFLMonitor(), StabilityActions("cap-lr", "restore", "stop")]

    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(cls, name, fails)
        found = run(NAMESPACES[1], CASE, tmp_path / "run", callbacks)
    assert differences(plain, found["compared"]) == []
    told = [str(warning.message) for warning in caught if "eos_monitor" in str(warning.message)]
    if calls > after:
        assert any("on purpose" in message and "training goes on" in message for message in told), told
    assert len(told) <= 4, told  # one a failure and one for giving up, not one a step


class OwnRates(torch.optim.Optimizer):
    """Sets its learning rates itself and has None in the groups, as Adafactor of transformers."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": None, "relative_step": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-0.01 if group["lr"] is None else -group["lr"])
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
        return loss


class KnownRates(OwnRates):
    pass


@pytest.fixture(scope="module", autouse=True)
def rule() -> Iterator[None]:
    """A rule of this file alone: other tests go through all that are registered."""
    register_critical_curvature(KnownRates)(lambda group, param, state: 2 / 0.01)
    yield
    _RULES.pop(KnownRates)


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.nn.Sequential(mlp(), torch.jit.script(torch.nn.Linear(CLASSES, CLASSES)))


def in_parts(params: Any) -> Any:
    first, *others = params
    return KnownRates([{"params": [first]}, {"params": others, "lr": 0.01}])


def on_its_way(optimizer: Any) -> Any:
    """Sets numbers where None was, as AdafactorSchedule does."""
    for group in optimizer.param_groups:
        group["initial_lr"] = 1.0
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.01)


def of_figures(patch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error("on purpose")

    for module in ("figures", "layers"):
        loaded = importlib.import_module(f"eos_monitor.dashboard.{module}")
        for name in ("run_figure", "layers_figure", "pixels_of"):
            if hasattr(loaded, name):
                patch.setattr(loaded, name, fails)


def of_memory(where: Any, name: str) -> Any:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("on purpose")

    return lambda patch: patch.setattr(where, name, fails)


ENDED_FITS = {
    "scripted": (Case(net=scripted), None, "TorchScript", 0),
    "own-rates": (Case(optimizer=OwnRates), None, None, 5),
    "known-rates": (Case(optimizer=KnownRates), None, None, 5),
    "some-known": (Case(optimizer=in_parts), None, None, 5),
    "rates-later": (Case(optimizer=KnownRates, scheduler=on_its_way), None, None, 5),
    "memory-of-updates": (CASE, of_memory(UpdateProjector, "__init__"), "on purpose", 5),
    "memory-of-steps": (CASE, of_memory(UpdateProjector, "after"), "on purpose", 5),
    "memory-of-samples": (CASE, of_memory(ProbeSamples, "observe"), "on purpose", 0),
    "memory-of-companions": (CASE, of_memory(ReadingContext, "__init__"), "on purpose", 5),
    "figures": (CASE, lambda patch: of_figures(patch, ValueError), "on purpose", 5),
    "memory-of-figures": (CASE, lambda patch: of_figures(patch, torch.OutOfMemoryError), "on purpose", 5),
}


@pytest.mark.parametrize("name", ENDED_FITS)
def test_what_ended_fits_costs_no_more_than_itself(name: str, tmp_path: Path) -> None:
    """TorchScript, groups without a learning rate, memory, figures: the run is the same, the other readings are there.

    In all of them nothing but the failure itself is lost: a group without a rate is no failure.
    """
    case, breaks, words, readings = ENDED_FITS[name]
    monitor = EdgeOfStabilityMonitor(3, probe=Probe(samples=16), alerts=())
    companions = [CFLMonitor(), PerturbationMonitor(at_steps=[3], steps=4), StabilityActions("cap-lr", "restore")]
    without = run(NAMESPACES[1], case, tmp_path / "without", lambda pl: None)["compared"]
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        if breaks is not None:
            breaks(patch)
        found = run(NAMESPACES[1], case, tmp_path / "with", lambda pl: [monitor, *companions])["compared"]
    assert differences(without, found) == []
    told = [str(warning.message) for warning in caught if "eos_monitor" in str(warning.message)]
    assert len(monitor.readings) == readings
    if words is None:
        assert told == []
        assert monitor.off == {}
    else:
        assert any(words in message and "training goes on" in message for message in told), told


@pytest.mark.parametrize("optimizer", [KnownRates, in_parts], ids=["all", "some"])
def test_an_edge_without_a_learning_rate_is_the_registered_one(optimizer: Any, tmp_path: Path) -> None:
    """Curvature 3 over 2 / 0.01, whatever stands in the groups."""

    monitor = EdgeOfStabilityMonitor(3, probe=Probe(samples=16, full_batch=True), alerts=(), loss_fn=bowl)
    with pytest.warns(UserWarning, match="is not the one that is trained"):
        run(NAMESPACES[1], Case(optimizer=optimizer), tmp_path / "run", lambda pl: monitor)
    assert [reading.edge_ratio for reading in monitor.readings] == pytest.approx([3.0 * 0.01 / 2] * 5, rel=1e-5)
    assert all(len(reading.lr) == (optimizer is in_parts) for reading in monitor.readings)


def bowl(module: Any, batch: Any) -> torch.Tensor:
    return sum(1.5 * p.square().sum() for p in module.parameters())


@pytest.mark.parametrize(
    ("place", "cadence"),
    [
        ("begin", "exact"),
        ("batch", "clock"),
        ("loss", "exact"),
        pytest.param("begin", "clock", marks=pytest.mark.slow),
        pytest.param("batch", "exact", marks=pytest.mark.slow),
        pytest.param("update", "clock", marks=pytest.mark.slow),
        pytest.param("update", "exact", marks=pytest.mark.slow),
        pytest.param("loss", "clock", marks=pytest.mark.slow),
        pytest.param("write", "exact", marks=pytest.mark.slow),
    ],
)
def test_a_hook_that_fails_on_one_process_ends_the_watching_on_both(place: str, cadence: str, tmp_path: Path) -> None:
    """It says so without waiting; the other hears of it where they would have met next, and nobody hangs."""
    results = {}
    for monitored in ("without", "with"):
        folder = tmp_path / monitored
        folder.mkdir()
        run_script(distributed_run.__file__, "ddp", monitored, f"hook-{place}-{cadence}", 64, folder)
        results[monitored] = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    for before, after in zip(results["without"], results["with"], strict=True):
        assert differences(before["compared"], after["compared"]) == []
    for rank, result in enumerate(results["with"]):
        (why,) = [why for activity, why in result["off"].items() if "watching" in activity]
        assert ("on purpose" if rank else "one that has left") in why
    assert len(results["with"][0]["readings"]) <= 24
