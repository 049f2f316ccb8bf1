"""The demo: that it trains what it says, and that all three runs get to their edge."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_utilities.core import rank_zero
from sklearn.datasets import load_digits
from torch import nn

from eos_monitor.lab.edge_demo import EdgeDemo, EdgeRun, edge_table, run_edge_demo
from tests.launching import started


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> EdgeDemo:
    """190 steps: AdamW's state is old enough at step 45, and the minibatch run has two readings."""
    return run_edge_demo(tmp_path_factory.mktemp("demo"), steps=190, seed=3)


def plain_losses(optimizer_class: Any, steps: int, seed: int, **settings: Any) -> list[float]:
    """The same training in a plain loop."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:1000])
    x = (x - x.mean()) / x.std()
    y = torch.eye(10, dtype=torch.float64)[torch.tensor(labels[:1000])]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)]
        net = nn.Sequential(*layers).double()
    optimizer = optimizer_class(net.parameters(), **settings)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((net(x) - y) ** 2).sum() / (2 * len(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_gradient_descent_is_the_recipe(demo: EdgeDemo) -> None:
    expected = plain_losses(torch.optim.SGD, 60, seed=3, lr=0.1)
    # 1e-9: sixty steps of float64 that sum in another order
    assert [loss for _, loss in demo.gradient_descent.losses[:60]] == pytest.approx(expected, rel=1e-9)


def test_adamw_is_torch_s_default_but_for_the_learning_rate(demo: EdgeDemo) -> None:
    expected = plain_losses(torch.optim.AdamW, 60, seed=3, lr=2e-3)
    # 1e-6: Adam divides by the root of gradients that start tiny, which magnifies the order of sums
    assert [loss for _, loss in demo.adamw.losses[:60]] == pytest.approx(expected, rel=1e-6)


def test_minibatch_sgd_is_the_recipe(demo: EdgeDemo) -> None:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:1000])
    x = (x - x.mean(dim=0)) / (x - x.mean(dim=0)).std()
    y = torch.eye(10, dtype=torch.float64)[torch.tensor(labels[:1000])]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)]
        net = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(3)
    expected = []
    for step in range(150):  # a pass over the data is 125 steps
        if step % 125 == 0:
            order = torch.randperm(1000, generator=generator)
        picked = order[8 * (step % 125) :][:8]
        loss = ((net(x[picked]) - y[picked]) ** 2).sum() / 16
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter -= 0.65 * (step + 1) / 300 * gradient
        expected.append(loss.item())
    # 1e-6: float64 sums in another order, magnified by 150 noisy steps; a wrong batch or rate is off by a tenth
    assert [loss for _, loss in demo.minibatch_sgd.losses[:150]] == pytest.approx(expected, rel=1e-6)


def test_readings_come_every_15_steps_and_one_at_the_end(demo: EdgeDemo) -> None:
    steps = [*range(0, 190, 15)]
    for run in (demo.gradient_descent, demo.adamw):
        assert [row["step"] for row in run.rows][: len(steps)] == steps
        assert run.rows[0]["full_batch"]
        assert run.rows[0]["samples"] == 1000
    assert [row["step"] for row in demo.gradient_descent.measured][: len(steps)] == steps
    assert demo.adamw.measured[0]["step"] == 45


def test_minibatch_readings_are_of_32_training_batches(demo: EdgeDemo) -> None:
    rows = demo.minibatch_sgd.rows
    assert [row["step"] for row in rows] == [95, 190]
    for row in rows:
        assert (row["samples"], row["full_batch"]) == (256, False)
        assert row["batch_sharpness_limits"] == pytest.approx([2 / (0.65 * (row["step"] + 1) / 300)] * 2)
    # lr·BS of the reading, with the learning rate of the step
    expected = 0.65 * 191 / 300 * rows[-1]["batch_sharpness"]
    assert demo.minibatch_sgd.mean_batch_sharpness(100) == pytest.approx(expected)
    assert demo.gradient_descent.mean_batch_sharpness(0) is None


def test_thresholds_read_from_the_optimizers_are_those_of_theory(demo: EdgeDemo) -> None:
    assert demo.gradient_descent.rows[-1]["threshold"] == demo.gradient_descent.theory == 2.0
    # 38 less 1e-5 of it for decoupled decay, and less 0.9^191 = 2e-9 of it for the bias correction at step 190
    assert demo.adamw.theory == pytest.approx(38 * (1 - 1e-5))
    assert demo.adamw.rows[-1]["threshold"] == pytest.approx(
        demo.adamw.theory * (1 - 0.9 ** (1 + demo.adamw.rows[-1]["step"]))
    )


def test_events_readings_and_figures_are_left(demo: EdgeDemo) -> None:
    for run in demo.runs:
        names = {path.name for path in run.folder.iterdir()}
        assert {"eos_readings.jsonl", "eos_run.png"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
        lines = (run.folder / "eos_readings.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == list(run.rows)
    assert demo.figure.read_bytes().startswith(b"\x89PNG")


def test_demo_leaves_generator_threads_and_loggers_alone(tmp_path: Path) -> None:
    loggers = [rank_zero.log, logging.getLogger("pytorch_lightning.eos_monitor")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    generator = torch.get_rng_state()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        run_edge_demo(tmp_path, steps=1)
        assert [logger.level for logger in loggers] == [logging.ERROR] * 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        for logger, (level, _, _) in zip(loggers, before, strict=True):
            logger.setLevel(level)
    assert [(logger.level, logger.propagate, logger.handlers) for logger in loggers] == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_second_demo_in_a_folder_keeps_the_first(tmp_path: Path) -> None:
    first, second = (run_edge_demo(tmp_path, steps=15, seed=seed) for seed in (0, 1))
    assert first.gradient_descent.folder != second.gradient_descent.folder
    assert len(second.gradient_descent.rows) == len(first.gradient_descent.rows) == 2
    assert first.gradient_descent.rows[0]["edge_ratio"] != second.gradient_descent.rows[0]["edge_ratio"]


def test_demo_refuses_no_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `steps` >= 1, got 0\."):
        run_edge_demo(tmp_path, steps=0)


def made_run(
    name: str, settings: str, theory: float, ratios: list[float | None], batchwise: float | None = None
) -> EdgeRun:
    rows = tuple(
        {
            "step": 10 * i,
            "edge_ratio": ratio,
            "normalized_sharpness": None if ratio is None else theory * ratio,
            "threshold": theory,
            "matvecs": i + 1,
            "overhead": 0.25,
            "batch_sharpness": None if batchwise is None else (i + 1) * batchwise,
            "batch_sharpness_limits": None if batchwise is None else [4.0, 4.0],
        }
        for i, ratio in enumerate(ratios)
    )
    minibatches = batchwise is not None
    return EdgeRun(name, settings, theory, 40, rows, (), 3.21, Path("folder"), minibatches)


MADE = EdgeDemo(
    made_run("gradient descent", "lr 0.1", 2.0, [0.5, 0.75, 1.125, 1.0, 1.25]),
    made_run("AdamW", "lr 0.002", 38.0, [None, 0.25, 0.75, 0.875, 0.875]),
    made_run("minibatch SGD", "lr 0.5, B 8", 2.0, [0.25, 0.375, 0.5, 0.5, 0.5], batchwise=0.75),
    Path("figure"),
)


def test_table_sets_what_was_seen_beside_theory() -> None:
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in edge_table(MADE).splitlines()]
    assert cells[:-2] == [
        ["gradient descent, lr 0.1", "AdamW, lr 0.002", "minibatch SGD, lr 0.5, B 8"],
        ["seen", "theory", "seen", "theory", "seen", "theory"],
        ["threshold", "2.000", "2.000", "38.000", "38.000", "2.000", "2.000"],
        ["mean normalized sharpness, steps 23 to 40", "2.250", "2.000", "33.250", "38.000", "1.000", "< 2"],
        ["mean edge ratio, steps 20 to 40", "1.125", "1.000", "0.833", "1.000", "0.500", "< 1"],
        # limits of 4 mean lr 0.5; the mean of 3, 4 and 5 times 0.75 is 3
        ["mean lr * batch sharpness, steps 20 to 40", "1.500", "2.000 **"],
        ["edge ratio of the first reading", "0.500", "< 1", "0.250", "< 1", "0.250", "< 1"],
        ["first step with an edge ratio of 1 or more", "20", "-", "-"],
        ["readings", "5", "4", "5"],
        ["products per reading (median)", "3", "4", "3"],
        ["time of readings / time of training *", "25%", "25%", "25%"],
        ["seconds in all", "3.2", "3.2", "3.2"],
    ]


def test_table_columns_stand_under_each_other() -> None:
    lines = edge_table(MADE).splitlines()[1:5]
    assert len({len(line) for line in lines}) == 1


def test_run_without_a_measured_edge_has_no_means() -> None:
    young = replace(MADE.adamw, rows=MADE.adamw.rows[:1])
    assert young.mean("edge_ratio", 0) is young.steps_to_edge is young.products is young.first_edge_ratio is None


# ---------------------------------------------------------------- the real thing


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_run_settles_at_its_edge(seed: int, tmp_path: Path) -> None:
    """Bands from the literature's recipe; eight seeds lay in 2.015-2.041 and 0.942-0.991 when they were set."""
    demo = run_edge_demo(tmp_path, seed=seed)
    sharpness = demo.gradient_descent.mean("normalized_sharpness", 700)
    ratio = demo.adamw.mean("edge_ratio", 600)
    assert sharpness is not None
    assert ratio is not None
    assert 1.95 <= sharpness <= 2.2
    assert 0.85 <= ratio <= 1.1
    # Theory: within 25 % of 2/lr, here from below. Five seeds lay in 0.78-0.92 when it was set, and the edge ratios
    # of the probe, which reads λ_max some 1.2 times too high, in 0.56-0.65.
    noisy = demo.minibatch_sgd
    batchwise = noisy.mean_batch_sharpness(600)
    noisy_ratio = noisy.mean("edge_ratio", 600)
    assert batchwise is not None
    assert noisy_ratio is not None
    assert 0.75 <= batchwise / 2 <= 1.15
    assert 0.4 <= noisy_ratio <= 0.75
    assert noisy.first_edge_ratio is not None
    assert noisy.first_edge_ratio < 0.5
    # They climb: the first reading is well below the edge.
    for run in (demo.gradient_descent, demo.adamw):
        assert run.first_edge_ratio is not None
        assert run.first_edge_ratio < 0.7
        assert run.rows[-1]["verdict"] in ("EDGE", "RESTRAINED")  # at the edge, steady or held back in its swings
        assert run.losses[-1][1] < 0.2 * run.losses[0][1]


def test_tensorboard_serves_layout_and_image(demo: EdgeDemo) -> None:
    folder = demo.figure.parent
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", "0", "--load_fast", "false"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 100
    with started(*command) as (_, said):
        while not (found := re.search(r" at (http\S+)\s", said())):
            assert time.monotonic() < deadline, said()
            time.sleep(0.1)
        address = found[1]

        def get(path: str) -> Any:
            with opener.open(f"{address}data/{path}", timeout=30) as answer:
                return json.load(answer)

        while len(get("runs")) < 6 and time.monotonic() < deadline:
            time.sleep(0.5)
        runs = {str(run.folder.relative_to(folder)) for run in demo.runs}
        assert set(get("runs")) == runs | {f"{run}/eos_layout" for run in runs}
        images = get("plugin/images/tags")
        layout = get("plugin/custom_scalars/layout")
    assert {run: set(tags) for run, tags in images.items()} == {run: {"eos/run"} for run in runs}
    tags = [tag for chart in layout["category"][0]["chart"] for tag in chart["multiline"]["tag"]]
    assert "^eos/edge_ratio$" in tags
