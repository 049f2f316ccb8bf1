"""The page of the optimizers: its code runs, and its tables are those of the code."""

import inspect
import re
import socket
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import critical_curvature, optim
from eos_monitor.lab.compare_optimizers import METHODS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")


def table(name: str) -> list[list[str]]:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", TEXT, re.S)
    assert found
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


@pytest.fixture
def one_process(monkeypatch: Any) -> Any:
    """What torchrun sets, for a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT, re.S)


def space() -> dict[str, Any]:
    """What the page calls yours."""
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(480, 1, 6, 6, generator=g), torch.randint(3, (480,), generator=g))
    loader = DataLoader(data, batch_size=32)
    names = {"torch": torch, "F": F, "pl": pl, "DataLoader": DataLoader, "make_net": make_net}
    return {**names, "net": make_net(), "data": data, "loader": loader, "endless": cycle(loader), "epochs": 2}


def test_there_are_as_many_blocks_as_are_run() -> None:
    assert len(blocks()) == 5


def test_loop_with_diffusion_ends_without() -> None:
    names = space()
    exec(blocks()[0], names)
    assert [group["initial_diffusion"] for group in names["groups"][:2]] == [0.95, 0.95]
    assert all(group["diffusion"] == 0 for group in names["optimizer"].param_groups)


def test_any_optimizer_can_be_perturbed() -> None:
    names = space()
    exec(blocks()[1], names)
    assert isinstance(names["optimizer"], torch.optim.Adam)


def test_loop_with_several_evaluations_takes_a_mini_batch_for_each() -> None:
    names = {**space(), "epochs": 4}
    drawn = []
    names["endless"] = (drawn.append(batch) or batch for batch in cycle(names["loader"]))
    exec(blocks()[2], names)
    assert len(drawn) == 60  # three steps of 20
    assert names["loss"].item() > 0


def test_run_in_lightning_has_an_edge(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = space()
    quiet = "max_epochs=3, accelerator='cpu', logger=False, enable_checkpointing=False, enable_model_summary=False"
    exec(blocks()[3].replace("max_epochs=3", quiet).replace("Monitor()", "Monitor(every_n_steps=3)"), names)
    assert [reading.step for reading in names["monitor"].readings] == [3, 6, 9]
    assert all(reading.edge_ratio > 0 for reading in names["monitor"].readings)


def test_loop_over_processes(one_process: None) -> None:
    names = space()
    before = [p.detach().clone() for p in names["net"].parameters()]
    exec(blocks()[4], names)
    assert all(not torch.equal(p, q) for p, q in zip(names["net"].parameters(), before, strict=True))


def test_readme_shows_a_group_that_diffuses() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "APDE" in b]
    names = space()
    exec(block, names)
    assert [group["diffusion"] for group in names["optimizer"].param_groups] == [0.95, 0.0]


# No symbols of the papers, but torch's or Python's.
OURS = {"params", "maximize", "foreach", "allow_unstable", "generator", "distributed"}


def test_every_argument_has_a_symbol() -> None:
    head, _, *rows = table("arguments")
    for column, cell in enumerate(head[2:], 2):
        optimizer = getattr(optim, cell.strip("`"))
        named = re.findall(r"`(\w+)`", " ".join(row[column] for row in rows))
        named = [name for name in named if name not in optim.__all__]
        assert sorted(named) == sorted({*inspect.signature(optimizer).parameters} - OURS), cell


def test_comparison_is_that_of_the_experiment() -> None:
    rows = table("comparison")[2:]
    assert [row[:2] for row in rows] == [[method.name, method.settings] for method in METHODS]


@pytest.mark.parametrize("name", ["HeatSmoothing", "EntropySGD", "HamiltonJacobi", "BurgersSGD", "ElasticSGD"])
def test_critical_curvature_at_the_defaults(name: str) -> None:
    found = re.search(rf"^\| `{name}` \| [^|]* \| ([\d.]+) \|", TEXT, re.M)
    assert found
    optimizer = getattr(optim, name)([nn.Parameter(torch.ones(1, dtype=torch.float64))])
    assert f"{float(critical_curvature(optimizer).c[0]):.2f}" == found[1]
