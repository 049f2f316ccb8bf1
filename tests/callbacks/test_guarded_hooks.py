"""Nothing of ours ends a fit: whatever fails in a hook, the run is the one without the monitor, and it is told."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from eos_monitor import CFLMonitor, EdgeOfStabilityMonitor, Probe, StabilityActions
from eos_monitor.callbacks.cfl_monitor import CFLMonitor as Layers
from eos_monitor.callbacks.monitored_fit import MonitoredFit
from eos_monitor.callbacks.outputs import RunOutputs
from eos_monitor.callbacks.schedulers import TrainerSchedulers
from eos_monitor.callbacks.trainer_gauge import TrainerGauge
from eos_monitor.forecast.tracked_reading import TrackedReading
from eos_monitor.monitor.engine import Engine
from eos_monitor.readings.schedule import Schedule
from eos_monitor.verdicts.detector import InstabilityDetector
from eos_monitor.verdicts.steps import StepBuffer
from tests.callbacks import distributed_run
from tests.callbacks.runs import NAMESPACES, Case, differences, run
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


@pytest.mark.parametrize("place", ["begin", "batch", "update", "loss", "write"])
@pytest.mark.parametrize("cadence", ["clock", "exact"])
def test_a_hook_that_fails_on_one_process_ends_the_watching_on_both(
    place: str, cadence: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """It says so without waiting; the other hears of it where they would have met next, and nobody hangs."""
    if (place, cadence) not in {("batch", "clock"), ("loss", "exact"), ("begin", "exact")}:
        request.applymarker(pytest.mark.slow)
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
