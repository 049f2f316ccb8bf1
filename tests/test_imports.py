"""Who may import whom (docs/architecture.md), read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eos_monitor

PACKAGE = Path(eos_monitor.__file__).parent
ROOM_FILES = sorted(PACKAGE.rglob("*.py"))

# room -> rooms of the package that it may import from (its own is always allowed)
ALLOWED = {
    "curvature": set(),
    "stability": {"curvature"},
    "cfl": {"curvature", "stability"},
    "perturbation": {"curvature", "stability"},
    "optim": {"stability"},
    "alerts": {"stability"},
    "dashboard": set(),
    "callbacks": {"curvature", "stability", "cfl", "perturbation", "optim", "alerts", "dashboard"},
    "lab": {"curvature", "stability", "cfl", "perturbation", "optim", "alerts", "dashboard", "callbacks", ""},
    "cli": {"lab", ""},
    "": set(),
}
# outside package -> rooms that may import it
OUTSIDE = {
    "torch": {"curvature", "stability", "cfl", "perturbation", "optim", "callbacks", "lab"},
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


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            if node.module == "eos_monitor":
                names += [f"eos_monitor.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", ROOM_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_rules(path: Path) -> None:
    room = room_of(path)
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "eos_monitor":
            other = rest.partition(".")[0]
            if other in eos_monitor.__all__ or other.startswith("__"):
                other = ""
            assert other == room or other in ALLOWED[room], f"{room or 'package'} must not import {name}"
        elif top in OUTSIDE:
            assert room in OUTSIDE[top], f"{room or 'package'} must not import {name}"


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
bases = [b.__module__.split('.')[0] for b in EdgeOfStabilityMonitor.__mro__[2:-1]]
print(sorted(set(bases)), {missing!r} in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    present = {"lightning", "pytorch_lightning"} - {missing}
    assert done.stdout.strip() == f"{sorted(present)} False"
