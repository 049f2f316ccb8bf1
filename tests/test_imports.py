"""Who may import whom (docs/architecture.md), read from the source."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import eos_monitor

PACKAGE = Path(eos_monitor.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The floors of the house, in the order in which data flows: a room may import its own floor's room and those above it.
FLOORS = (
    {"isolation"},
    {"curvature"},
    {"limits"},
    {"readings"},
    {"verdicts"},
    {"forecast"},
    {"alerts", "dashboard"},
    {"monitor"},
    {"cfl", "perturbation", "optim"},
    {"callbacks"},
    {"lab"},
    {"cli"},
)
# Rooms that need less than all that lies above them.
NOTHING_BUT = {
    "alerts": {"verdicts", "readings"},
    "dashboard": set(),
    "optim": {"isolation", "limits"},
    "cfl": {"isolation", "curvature", "limits", "readings"},
    "perturbation": {"isolation", "curvature", "limits", "readings", "forecast"},
    "cli": {"lab"},
}
# outside package -> rooms that may import it
NUMERICS = {"isolation", "curvature", "limits", "readings", "verdicts", "forecast", "monitor", "cfl", "perturbation"}
OUTSIDE = {
    "torch": NUMERICS | {"optim", "callbacks", "lab"},
    "torchmetrics": {"cfl"},
    "lightning": {"callbacks", "lab"},
    "pytorch_lightning": {"callbacks", "lab"},
    "lightning_fabric": {"callbacks", "lab"},
    "tensorboard": {"dashboard"},
    "matplotlib": {"dashboard", "lab"},
    "sklearn": {"lab"},
    "tqdm": {"lab"},
}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def allowed(room: str) -> set[str]:
    """Rooms of the package that ``room`` may import from, besides its own."""
    above: set[str] = set()
    for floor in FLOORS:
        if room in floor:
            return NOTHING_BUT.get(room, above)
        above = above | floor
    return set()


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            if (node.module or "").partition(".")[0] == "eos_monitor":
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def files_imported(path: Path) -> set[str]:
    """Files of the package that ``path`` imports, also those that are imported for types only."""
    known = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in FILES if p.name != "__init__.py"}
    return {name for name in imported(path) if name in known}


def first_circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_rules(path: Path) -> None:
    room = room_of(path)
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "eos_monitor":
            other = rest.partition(".")[0]
            if other in eos_monitor.__all__ or other.startswith("__"):  # public names: for the shells that users run
                other = "" if room in ("lab", "cli") else other
            assert other in {"", room} | allowed(room), f"{room or 'package'} must not import {name}"
        elif top in OUTSIDE:
            assert room in OUTSIDE[top], f"{room or 'package'} must not import {name}"


def test_no_files_import_one_another_in_a_circle() -> None:
    graph = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): files_imported(p) for p in FILES}
    assert first_circle(graph) is None


def test_a_circle_is_seen(tmp_path: Path) -> None:
    """Two files of the package that name one another, if only for types."""
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from eos_monitor.readings.{} import x\n"
    (tmp_path / "gauge.py").write_text(source.format("schedule"))
    (tmp_path / "schedule.py").write_text(source.format("gauge"))
    graph = {f"eos_monitor.readings.{name}": files_imported(tmp_path / f"{name}.py") for name in ("gauge", "schedule")}
    circle = first_circle(graph)
    assert circle is not None
    assert set(circle) == {"eos_monitor.readings.gauge", "eos_monitor.readings.schedule"}


def test_every_room_has_a_floor_and_every_file_a_name_of_its_own() -> None:
    rooms = {room_of(path) for path in FILES} - {""}
    assert rooms == set().union(*FLOORS)
    names = [path.stem for path in FILES if path.stem != "__init__"] + [r for r in rooms if (PACKAGE / r).is_dir()]
    assert sorted(names) == sorted(set(names))


def test_every_public_name_exists() -> None:
    for name in eos_monitor.__all__:
        assert getattr(eos_monitor, name).__name__ == name
    assert set(eos_monitor.__all__) <= set(dir(eos_monitor))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sharpness'"):
        eos_monitor.sharpness  # noqa: B018


@pytest.mark.parametrize("module", ["eos_monitor", "eos_monitor.dashboard.layout", "eos_monitor.dashboard.report"])
def test_dashboard_and_package_load_without_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'pytorch_lightning', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("missing", ["lightning", "pytorch_lightning"])
def test_one_lightning_package_is_enough(missing: str) -> None:
    """The base class is built from the packages that are there; find_spec is told that one is not."""
    code = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {missing!r} else real(name, *a)
from eos_monitor import EdgeOfStabilityMonitor
EdgeOfStabilityMonitor()
bases = [b.__module__.split('.')[0] for b in EdgeOfStabilityMonitor.__mro__[3:-1]]
print(sorted(set(bases)), {missing!r} in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    present = {"lightning", "pytorch_lightning"} - {missing}
    assert done.stdout.strip() == f"{sorted(present)} False"
