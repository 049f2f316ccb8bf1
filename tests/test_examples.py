"""Every example runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# example -> arguments of `main` that keep it short
SETTINGS: dict[str, dict[str, Any]] = {
    "quickstart": {"max_epochs": 4},
    "compare_optimizers": {"seeds": 2, "epochs": 1},
    "layerwise_cfl": {"steps": 32},
    "alert_to_webhook": {"steps": 48},
    "lr_governor": {"steps": 130},
}


def test_every_example_is_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SETTINGS)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**SETTINGS[name])


def test_quickstart_tells_and_leaves_what_it_promises(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run("quickstart")
    # 1797 digits make 29 batches, four epochs 116 steps: readings before steps 50 and 100
    assert report.startswith("2 readings, steps 50 to 100.")
    assert report in capsys.readouterr().out
    folder = workplace / "lightning_logs" / "version_0"
    names = {path.name for path in folder.iterdir()}
    assert {"eos_readings.jsonl", "eos_run.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_comparison_makes_its_table_and_picture(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = run("compare_optimizers")
    assert table in capsys.readouterr().out
    assert "| Entropy-SGD |" in table
    assert (workplace / "compare_optimizers.png").stat().st_size > 10_000


def test_layers_at_the_edge_are_ranked_and_drawn(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = run("layerwise_cfl")
    told = capsys.readouterr().out
    assert table in told
    assert sorted(line.split()[0] for line in table.splitlines()) == ["conv1", "conv2", "conv3", "head"]
    # The climb to the edge ends around step 28.
    assert any(int(n) > 0 for n in re.findall(r"'head': (\d)", told))
    folder = workplace / "lightning_logs" / "version_0"
    assert {"cfl_readings.jsonl", "cfl_layers.png", "eos_readings.jsonl"} <= {path.name for path in folder.iterdir()}


def test_webhook_gets_the_alerts(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    received = run("alert_to_webhook")
    assert "\n".join(received) in capsys.readouterr().out
    assert any("[jump-risk]" in text for text in received)
    assert "[DIVERGING]" in received[-1]


@pytest.mark.filterwarnings("ignore:eos_monitor could not take a reading")  # of what the dry run lets blow up
def test_governor_lowers_the_rate_that_the_dry_run_only_names(workplace: Path) -> None:
    messages = run("lr_governor")
    assert any(message.startswith("would have lowered lr 7.5 →") for message in messages)
    assert messages[-1].startswith("lowered lr 7.5 →")
    assert (workplace / "lr_governor.png").stat().st_size > 10_000
