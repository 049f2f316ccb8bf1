"""The command line, as a user meets it."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import eos_monitor
from eos_monitor.cli import main, tensorboard_command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"eos-monitor {eos_monitor.__version__}\n"


def test_demo_shows_table_files_and_the_next_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "45", "--output", "my demo"]) == 0
    shown = capsys.readouterr()
    assert "mean edge ratio, steps 22 to 45" in shown.out
    assert "45/45" in shown.out  # the progress bars
    folder = Path("my demo")
    assert f"All runs in one figure: {folder / 'edge_of_stability.png'}" in shown.out
    assert "--logdir 'my demo'" in shown.out
    names = {"edge_of_stability.png", "gradient_descent", "adamw", "minibatch_sgd"}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["my demo"]  # nothing anywhere else
    # What Lightning says of devices, loggers and workers is not for a first look.
    assert shown.err == ""
    assert not any(word in shown.out for word in ("GPU", "TPU", "Tip", "workers", "max_epochs"))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param([], "COMMAND", id="no command"),
        pytest.param(["show"], "invalid choice: 'show'", id="unknown command"),
        pytest.param(["demo", "--steps", "0"], "expected a whole number >= 1, got '0'", id="no steps"),
        pytest.param(["demo", "--steps", "many"], "expected a whole number >= 1, got 'many'", id="steps in words"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_output_that_is_a_file_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "taken"
    file.write_text("kept")
    assert main(["demo", "--output", str(file)]) == 2
    assert capsys.readouterr().err == f"eos-monitor: cannot write to {file}: File exists\n"
    assert file.read_text() == "kept"


def test_switched_off_monitor_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EOS_MONITOR", "OFF")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "EOS_MONITOR=off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")], ids=["scikit-learn", "plot"]
)
def test_missing_extra_is_one_line(
    module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "eos_monitor.lab.edge_demo", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"eos-monitor: the demo needs {package}: pip install 'eos-monitor[demo]'\n"


def test_another_missing_module_is_not_blamed_on_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "eos_monitor.lab.edge_demo", raising=False)
    monkeypatch.setitem(sys.modules, "eos_monitor.dashboard.figures", None)
    with pytest.raises(ModuleNotFoundError, match="figures"):
        main(["demo", "--output", str(tmp_path)])


def test_terminal_without_greek_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii", write_through=True))
    assert main(["demo", "--steps", "1", "--output", str(tmp_path)]) == 0
    assert b"edge ratio 0.571 ?" in b" ".join(screen.getvalue().split())  # the plus-minus sign


def make_executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return path


def test_tensorboard_on_the_path_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = make_executable(tmp_path / "bin" / "tensorboard")
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.setenv("PATH", str(script.parent))
    assert tensorboard_command(Path("eos_demo")) == "tensorboard --logdir eos_demo"


def test_tensorboard_of_another_environment_is_not_the_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, own = (make_executable(tmp_path / name / "bin" / "tensorboard") for name in ("other", "own"))
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.chdir(tmp_path)
    assert tensorboard_command(Path("eos_demo")) == "own/bin/tensorboard --logdir eos_demo"


def test_tensorboard_without_a_script_is_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert tensorboard_command(Path("a b")) == f"{tmp_path}/python -m tensorboard.main --logdir 'a b'"


def test_tensorboard_command_starts(tmp_path: Path) -> None:
    command = shlex.split(tensorboard_command(tmp_path))
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2.")
