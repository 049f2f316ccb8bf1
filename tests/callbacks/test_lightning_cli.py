"""The callbacks in the YAML of LightningCLI, in both name spaces."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import CFLMonitor, EdgeOfStabilityMonitor, PerturbationMonitor, Probe, Solver, StabilityActions

# Lightning itself calls what jsonargparse deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
LIBRARIES = ("lightning.pytorch", "pytorch_lightning")

SHORT = """
seed_everything: 0
trainer:
  max_steps: 4
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""

ALL = """
trainer:
  callbacks:
    - class_path: eos_monitor.EdgeOfStabilityMonitor
      init_args:
        every_n_steps: 2
        loss_fn: my_project.loss_fn
        probe: {samples: 32, full_batch: false, batch_size_fn: my_project.batch_size}
        solver: {k: 2, rtol: 0.001, seed: 3}
        alerts:
          - log
          - class_path: eos_monitor.JSONLinesSink
            init_args: {path: alerts.jsonl}
        verify: false
    - class_path: eos_monitor.CFLMonitor
      init_args: {layers: "net.*", exact: true, solver: {seed: 3}}
    - class_path: eos_monitor.PerturbationMonitor
      init_args: {at_steps: [2], steps: 2}
    - class_path: eos_monitor.StabilityActions
      init_args: {what: [cap-lr, restore], snapshot_every: 16}
"""

# Whoever writes a loss function need not annotate it.
MY_PROJECT = """
import torch.nn.functional as F

def loss_fn(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])

def batch_size(batch):
    return len(batch[1])
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a module of the user's. LightningCLI warns of a command line beside its `args`."""
    (tmp_path / "my_project.py").write_text(MY_PROJECT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    yield
    sys.modules.pop("my_project", None)


def fit(library: str, *configs: str) -> Any:
    """Return LightningCLI after ``train.py fit --config …`` for each of the configs, the last one winning."""
    lightning = importlib.import_module(library)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def train_dataloader(self) -> Any:
            data = TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
            return DataLoader(data, batch_size=16)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    args = ["fit"]
    for i, config in enumerate(configs):
        Path(f"config_{i}.yaml").write_text(config, encoding="utf-8")
        args += ["--config", f"config_{i}.yaml"]
    return importlib.import_module(f"{library}.cli").LightningCLI(Module, args=args)


def found(cli: Any, *kinds: type) -> list[Any]:
    """Return the callback of each kind."""
    return [callback for kind in kinds for callback in cli.trainer.callbacks if isinstance(callback, kind)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_callback_takes_its_settings_from_yaml(library: str) -> None:
    cli = fit(library, SHORT, ALL)
    monitor, layers, twins, actions = found(
        cli, EdgeOfStabilityMonitor, CFLMonitor, PerturbationMonitor, StabilityActions
    )
    my_project = sys.modules["my_project"]
    assert [reading.step for reading in monitor.readings] == [2, 4]
    assert all(len(reading.eigenvalues) == 2 and reading.edge_ratio > 0 for reading in monitor.readings)
    settings = monitor._settings
    assert settings.loss_fn is my_project.loss_fn
    assert settings.probe == Probe(samples=32, full_batch=False, batch_size_fn=my_project.batch_size)
    assert settings.solver == Solver(k=2, rtol=0.001, seed=3)
    assert settings.verify is False
    assert Path("alerts.jsonl").exists()
    assert {estimate.layer for estimate in layers.estimates} == {"net.0", "net.2"}
    assert {estimate.method for estimate in layers.estimates} == {"exact"}
    assert [twin.steps for twin in twins.runs.values()] == [2]
    assert actions.names == {"cap-lr", "restore"}
    assert actions.dry_run
    # The file that LightningCLI leaves for repeating a run repeats this one.
    left = Path("config.yaml").rename("left.yaml").read_text(encoding="utf-8")
    (again,) = found(fit(library, left), EdgeOfStabilityMonitor)
    assert [reading.edge_ratio for reading in again.readings] == [reading.edge_ratio for reading in monitor.readings]
    assert again._settings.probe == settings.probe


@pytest.mark.parametrize("library", LIBRARIES)
def test_yaml_of_the_quickstart_runs(library: str) -> None:
    (snippet,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    cli = fit(library, snippet, SHORT)
    monitor, actions = found(cli, EdgeOfStabilityMonitor, StabilityActions)
    assert len(monitor.readings) > 0
    assert monitor._settings.probe == Probe(samples=512)
    assert monitor._settings.solver == Solver(k="edge")
    assert monitor._settings.loss_fn is sys.modules["my_project"].loss_fn
    assert actions.names == {"cap-lr", "restore"}


@pytest.mark.parametrize("name", ["EdgeOfStabilityMonitor", "CFLMonitor", "PerturbationMonitor"])
def test_a_kind_of_batches_stands_for_a_probe(name: str) -> None:
    config = f"trainer: {{callbacks: [{{class_path: eos_monitor.{name}, init_args: {{probe: batch}}}}]}}"
    (monitor,) = found(fit(LIBRARIES[0], SHORT, config), EdgeOfStabilityMonitor, CFLMonitor, PerturbationMonitor)
    host = monitor if name == "EdgeOfStabilityMonitor" else monitor._own_host
    assert host._settings.probe == Probe("batch")
    assert len(host.readings) > 0


@pytest.mark.parametrize(
    ("name", "settings", "unknown"),
    [
        ("EdgeOfStabilityMonitor", "{every_n_step: 2}", "every_n_step"),
        ("EdgeOfStabilityMonitor", "{probe: {sample: 32}}", "sample"),
        ("EdgeOfStabilityMonitor", "{solver: {modes: 2}}", "modes"),
        ("CFLMonitor", "{probe: {sample: 32}}", "sample"),
        ("PerturbationMonitor", "{solver: {modes: 2}}", "modes"),
        ("StabilityActions", "{what: stop, dryrun: true}", "dryrun"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_it(
    name: str, settings: str, unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fit(LIBRARIES[0], f"trainer: {{callbacks: [{{class_path: eos_monitor.{name}, init_args: {settings}}}]}}")
    # "Key … is not expected" in jsonargparse 4.39.
    assert re.findall(r"'([\w.]+)' is not (?:accepted|expected)", capsys.readouterr().err) == [unknown]


def test_a_value_out_of_range_is_an_error_that_tells_the_range() -> None:
    config = "trainer: {callbacks: [{class_path: eos_monitor.StabilityActions, init_args: {what: cap_lr}}]}"
    with pytest.raises(ValueError, match=r"Expected actions of \('stop', 'checkpoint', 'cap-lr', 'restore'\)"):
        fit(LIBRARIES[0], config)
