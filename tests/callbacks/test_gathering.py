"""Losses that exchange between processes, where one of them measures alone: told, never a wait for ever."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks import gathering_run
from tests.launching import run_script

_SLOW = pytest.mark.slow
REASON = "one process can evaluate alone"


def launch(monitor: str, exchange: str, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    run_script(gathering_run.__file__, monitor, exchange, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def same_weights(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x["weights"], y["weights"], strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("monitor", ["cfl", "perturbation"])
@pytest.mark.parametrize(
    "exchange",
    [
        "lightning",
        pytest.param("differentiable", marks=_SLOW),
        pytest.param("object", marks=_SLOW),
        pytest.param("barrier", marks=_SLOW),
    ],
)
def test_what_the_first_process_measures_ends_with_a_reason(monitor: str, exchange: str, tmp_path: Path) -> None:
    without = launch("without", exchange, tmp_path / "without")
    monitored = launch(monitor, exchange, tmp_path / "with")
    assert same_weights(without, monitored)
    (why,) = monitored[0]["off"].values()
    assert REASON in why
    assert monitored[0]["measured"] == 0


@pytest.mark.slow
def test_readings_of_all_processes_exchange_as_training_does(tmp_path: Path) -> None:
    without = launch("without", "lightning", tmp_path / "without")
    monitored = launch("edge", "lightning", tmp_path / "with")
    assert same_weights(without, monitored)
    first, second = ([reading.edge_ratio for reading in result["readings"]] for result in monitored)
    assert first == second
    assert len(first) >= 5
    assert monitored[0]["off"] == {}


@pytest.mark.slow
def test_readings_of_all_processes_are_cut_off_together(tmp_path: Path) -> None:
    first, second = (result["readings"] for result in launch("cut", "lightning", tmp_path / "cut"))
    assert [r.edge_ratio for r in first] == [r.edge_ratio for r in second]
    assert len(first) >= 5
    assert {r.matvecs for r in first} == {3}
    assert not any(r.converged for r in first)


@pytest.mark.slow
def test_the_probe_grows_on_all_processes_together(tmp_path: Path) -> None:
    first, second = (result["readings"] for result in launch("grown", "lightning", tmp_path / "grown"))
    assert [(r.step, r.samples, r.edge_ratio) for r in first] == [(r.step, r.samples, r.edge_ratio) for r in second]
    assert first[0].samples == 8  # a batch of 4 on each
    assert first[0].step == 3
    assert first[-1].samples > 8


def test_a_plain_loop_around_data_parallelism_is_measured_on_each_process(tmp_path: Path) -> None:
    without = launch("loop-without", "none", tmp_path / "without")
    monitored = launch("loop-probe", "none", tmp_path / "with")
    assert same_weights(without, monitored)
    for result in monitored:
        assert result["off"] == {}
        assert all(ratio is not None and ratio > 0.0 for ratio in result["readings"])
    assert monitored[0]["readings"] != monitored[1]["readings"]  # each on its own batch


def test_a_plain_loop_whose_loss_exchanges_is_not_measured(tmp_path: Path) -> None:
    without = launch("loop-without", "reduce", tmp_path / "without")
    monitored = launch("loop-probe", "reduce", tmp_path / "with")
    assert same_weights(without, monitored)
    for result in monitored:
        assert REASON in result["off"]["measuring"]
