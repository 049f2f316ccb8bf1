"""Each run has one place for its files, and no two callbacks of a Trainer write under one name."""

import importlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from eos_monitor import CFLMonitor, EdgeOfStabilityMonitor, Probe, StabilityActions
from eos_monitor.callbacks.folders import free_path
from tests.callbacks import distributed_run
from tests.callbacks.runs import NAMESPACES, Case, make_module
from tests.launching import run_script

pl = importlib.import_module(NAMESPACES[1])


def monitor(**settings: Any) -> EdgeOfStabilityMonitor:
    return EdgeOfStabilityMonitor(**{"every_n_steps": 2, "probe": Probe(samples=8), "alerts": ("jsonl",), **settings})


def fit(folder: Path, callbacks: list[Any], logger: Any = False, ckpt_path: Any = None, epochs: int = 1) -> Any:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(32, 8), torch.randint(3, (32,)))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )
    module = make_module(pl, Case(during=None))
    type(module).logger = property(lambda self: _Quiet())  # the step of this module logs directly
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=ckpt_path)
    return trainer


class _Quiet:
    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass


class WithoutFolder(pl.loggers.logger.Logger):
    """As those of Weights & Biases and MLflow: a folder for all runs, a project, and a name of the run."""

    def __init__(self, folder: Path | None, name: str | None, version: Any) -> None:
        super().__init__()
        self._of = (folder, name, version)

    @property
    def save_dir(self) -> str | None:
        return None if self._of[0] is None else str(self._of[0])

    @property
    def name(self) -> str | None:
        return self._of[1]

    @property
    def version(self) -> Any:
        return self._of[2]

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def runs_in(path: Path) -> list[str]:
    """The runs whose rows are in a file, in their order."""
    return list(dict.fromkeys(json.loads(line)["run"] for line in path.read_text().splitlines()))


def places(root: Path) -> list[str]:
    """Folders with readings, relative to ``root``; in each there is a figure too, and one run."""
    found = sorted(root.rglob("eos_readings.jsonl"))
    for path in found:
        assert (path.parent / "eos_run.png").exists()
        assert len(runs_in(path)) == 1
    return [path.parent.relative_to(root).as_posix() for path in found]


def test_without_a_logger_each_run_has_a_folder(tmp_path: Path) -> None:
    for _ in range(3):
        fit(tmp_path, [monitor(), CFLMonitor()])
    assert places(tmp_path) == [f"eos_logs/version_{n}" for n in range(3)]
    assert [path.name for path in tmp_path.iterdir()] == ["eos_logs"]
    for path in (tmp_path / "eos_logs").iterdir():
        assert {"cfl_readings.jsonl", "cfl_layers.png"} <= {file.name for file in path.iterdir()}


@pytest.mark.parametrize(
    ("name", "version", "place"),
    [
        ("project", "3f2a", "project/3f2a"),
        ("12", 4, "12/version_4"),
        (None, "3f2a", "3f2a"),
        ("project", None, "project/eos_logs/version_0"),
    ],
    ids=["wandb", "number", "unnamed", "unversioned"],
)
def test_a_logger_without_a_folder_of_the_run_gets_that_of_its_checkpoints(
    name: Any, version: Any, place: str, tmp_path: Path
) -> None:
    fit(tmp_path / "root", [monitor()], WithoutFolder(tmp_path / "saved", name, version))
    assert places(tmp_path) == [f"saved/{place}"]
    fit(tmp_path / "root", [monitor()], WithoutFolder(None, name, version))
    assert f"root/{place}" in places(tmp_path)


def test_it_is_where_model_checkpoint_puts_its_own(tmp_path: Path) -> None:
    logger = WithoutFolder(tmp_path / "saved", "project", "3f2a")
    checkpoint = pl.callbacks.ModelCheckpoint()
    trainer = fit(tmp_path, [monitor()], logger)
    ours = Path(checkpoint._ModelCheckpoint__resolve_ckpt_dir(trainer)).parent
    assert places(tmp_path) == [ours.relative_to(tmp_path).as_posix()]


@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger", "without"])
def test_a_logger_that_goes_on_in_its_folder_mixes_no_runs(kind: str, tmp_path: Path) -> None:
    def logger() -> Any:
        if kind == "without":
            return WithoutFolder(tmp_path, "logs", "version_7")
        return getattr(pl.loggers, kind)(tmp_path, name="logs", version=7)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSVLogger says that it will delete its own
        for _ in range(3):
            fit(tmp_path, [monitor()], logger())
    here = "logs/version_7"
    assert set(places(tmp_path)) == {here, f"{here}/eos_logs/version_0", f"{here}/eos_logs/version_1"}


def test_a_resumed_run_goes_on_where_its_logger_does(tmp_path: Path) -> None:
    logger = WithoutFolder(tmp_path, "project", "3f2a")
    first = fit(tmp_path, [monitor()], logger)
    first.save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path, [monitor()], logger, tmp_path / "last.ckpt", 2)
    place = tmp_path / "project" / "3f2a"
    assert [path.parent for path in tmp_path.rglob("eos_readings.jsonl")] == [place]
    assert len(runs_in(place / "eos_readings.jsonl")) == 2
    assert {path.name for path in place.glob("*.png")} == {"eos_run.png", "eos_run-2.png"}
    # Without a logger Lightning goes on nowhere.
    fit(tmp_path / "plain", [monitor()], False, tmp_path / "last.ckpt", 2)
    fit(tmp_path / "plain", [monitor()], False, tmp_path / "last.ckpt", 2)
    assert places(tmp_path / "plain") == ["eos_logs/version_0", "eos_logs/version_1"]


def test_two_fits_of_one_trainer_are_two_runs(tmp_path: Path) -> None:
    watch = monitor()
    trainer = fit(tmp_path, [watch])
    trainer.fit_loop.max_epochs = 2
    data = torch.utils.data.TensorDataset(torch.randn(32, 8), torch.randint(3, (32,)))
    trainer.fit(trainer.lightning_module, torch.utils.data.DataLoader(data, batch_size=8))
    assert places(tmp_path) == ["eos_logs/version_0", "eos_logs/version_1"]


def test_a_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    module = make_module(pl, Case())
    data = torch.utils.data.TensorDataset(torch.randn(32, 8), torch.randint(3, (32,)))
    trainer = pl.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[monitor()], default_root_dir=tmp_path)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    assert list(tmp_path.iterdir()) == []


def test_both_processes_have_one_place(tmp_path: Path) -> None:
    run_script(distributed_run.__file__, "ddp", "with", "none", 32, tmp_path)
    assert len(places(tmp_path)) == 1


def test_a_free_path_is_no_file_yet(tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    for name in ("run.png", "run-2.png", "run-3.png"):
        assert free_path(path).name == name
        free_path(path).touch()


# ---------------------------------------------------------------- names


def test_callbacks_without_names_of_their_own_get_some(tmp_path: Path, caplog: Any) -> None:
    """Each has keys, files, lines and a state of its own; those that were asked for by name keep it."""
    first, second, third = monitor(), monitor(), monitor()
    named = monitor(name="eos-2")
    layers, same = CFLMonitor(), CFLMonitor(name="eos")
    acting, more = StabilityActions("stop"), StabilityActions("checkpoint")
    callbacks = [first, second, named, third, layers, same, acting, more]
    with caplog.at_level(logging.INFO):
        trainer = fit(tmp_path, callbacks)
    names = [callback.name for callback in callbacks]
    assert names == ["eos", "eos-3", "eos-2", "eos-4", "cfl", "eos-5", "eos", "eos-2"]
    assert len({callback.state_key for callback in callbacks}) == len(callbacks)
    written = tmp_path / "eos_logs" / "version_0"
    for name in names[:6]:
        assert len(runs_in(written / f"{name}_readings.jsonl")) == 1
    lines = [record.getMessage() for record in caplog.records if "eos_monitor" in record.getMessage()]
    assert all(any(line.startswith(f"eos_monitor [{name}]: ") for line in lines) for name in names[:6])
    assert sum("another callback is named 'eos'" in line for line in lines) == 4
    # The states find their way back.
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {callback.state_key for callback in callbacks} <= set(kept)
    again = [monitor(), monitor(), monitor(name="eos-2"), monitor(), CFLMonitor(), CFLMonitor(name="eos")]
    again += [StabilityActions("stop"), StabilityActions("checkpoint")]
    fit(tmp_path, again, False, tmp_path / "last.ckpt", 2)
    assert [callback.name for callback in again] == names
    assert all(callback.readings[0].step == 4 for callback in again[:4])


def test_a_name_is_the_callbacks_own_again_where_nobody_else_has_it(tmp_path: Path) -> None:
    first, second = monitor(), monitor()
    fit(tmp_path, [first, second])
    fit(tmp_path, [second])
    assert second.name == "eos"
