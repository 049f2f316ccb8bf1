"""What the monitor does in a real Trainer."""

import importlib
import json
import logging
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from torch import nn

from eos_monitor import Alert, EdgeOfStabilityMonitor, Probe, Solver, Verdict
from eos_monitor.callbacks import monitored_fit
from eos_monitor.dashboard.layout import custom_scalars_layout
from tests.callbacks.runs import logs_of

pl = importlib.import_module("pytorch_lightning")


class Net(pl.LightningModule):
    """Least squares, whose Hessian 2/N XᵀX is known: λ_max is 9 on `PROBE`."""

    def __init__(self, lr: float = 0.1, **kwargs: Any) -> None:
        super().__init__()
        self.lr, self.kwargs = lr, kwargs
        self.net = nn.Linear(2, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, **self.kwargs)


PROBE = torch.tensor([[1.0, 0.0], [0.0, 3.0]])


def fit(module: Any, monitor: Any, tmp_path: Path, batches: Any = None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "callbacks": [monitor],
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(**{**defaults, **settings})
    trainer.fit(module, torch.utils.data.DataLoader(batches or [PROBE], batch_size=None), ckpt_path=ckpt_path)
    return trainer


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_readings_match_the_closed_form(tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=2)
    fit(Net(lr=0.1, momentum=0.9, weight_decay=0.5), monitor, tmp_path)
    assert [reading.step for reading in monitor.readings] == [0, 2, 4]
    for reading in monitor.readings:
        # float32, residual 1e-4 at the cold start: relative error of λ far below 1e-5
        assert reading.sharpness == pytest.approx(9.0, rel=1e-5)
        assert reading.threshold == pytest.approx(3.8)
        assert reading.edge_ratio == pytest.approx((9.0 + 0.5) * 0.1 / 3.8, rel=1e-5)
        assert reading.edge_lr == pytest.approx((3.8 / 9.5,), rel=1e-5)
        assert reading.full_batch
        assert reading.lr == (0.1,)
    assert monitor.verdict is Verdict.STABLE


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_rows_reach_tensorboard_under_lightnings_own_step(namespace: str, tmp_path: Path) -> None:
    other = importlib.import_module(namespace)

    class Logged(other.LightningModule):
        training_step_loss = None
        __init__, configure_optimizers = Net.__init__, Net.configure_optimizers

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.net(batch).square().mean()
            self.log("train_loss", loss)
            return loss

    def init(self: Any) -> None:
        other.LightningModule.__init__(self)
        self.lr, self.kwargs, self.net = 0.1, {}, nn.Linear(2, 1, bias=False)

    Logged.__init__ = init
    logger = other.loggers.TensorBoardLogger(tmp_path)
    monitor = EdgeOfStabilityMonitor(every_n_steps=2)
    trainer = other.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Logged(), torch.utils.data.DataLoader([PROBE], batch_size=None))
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("eos/edge_ratio")] == [0, 2, 4]
    assert [event.step for event in events.Scalars("train_loss")] == [0, 1, 2, 3]
    assert events.Scalars("eos/normalized_sharpness")[0].value == pytest.approx(0.9, rel=1e-5)
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("eos/")}
    scalars = ["sharpness", "normalized_sharpness", "threshold", "edge_ratio", "error", "edge_scale", "edge_lr"]
    assert tags == {f"eos/{key}" for key in [*scalars, "verdict", "matvecs", "overhead"]}
    assert events.Tags()["images"] == ["eos/run"]
    assert "eos/alerts/text_summary" in events.Tags()["tensors"]
    layout = EventAccumulator(f"{logger.log_dir}/eos_layout").Reload()
    assert layout.Tags()["tensors"] == ["custom_scalars__config__"]
    assert (Path(logger.log_dir) / "eos_run.png").stat().st_size > 10_000


def test_rows_are_in_the_file_with_run_id_and_verdict(tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=2)
    fit(Net(), monitor, tmp_path)
    rows = rows_of(logs_of(tmp_path) / "eos_readings.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert {row["verdict"] for row in rows} == {"STABLE"}
    assert len({row["run"] for row in rows}) == 1
    assert rows[0]["edge_ratio"] == monitor.readings[0].edge_ratio
    fit(Net(), monitor, tmp_path)  # a second fit starts afresh, elsewhere
    again = rows_of(logs_of(tmp_path) / "eos_readings.jsonl")
    assert {row["run"] for row in again}.isdisjoint({row["run"] for row in rows})
    assert len(monitor.readings) == len(again) == 3


def test_learning_rate_is_the_one_the_step_uses(tmp_path: Path) -> None:
    """The warm-up recipe sets it in optimizer_step, after the measurement; a step scheduler moves it after the step."""

    class WarmUp(Net):
        def __init__(self) -> None:
            super().__init__(lr=1.0)
            self.used: list[float] = []

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (self.trainer.global_step + 1)
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.used.append(optimizer.param_groups[0]["lr"])

    module, monitor = WarmUp(), EdgeOfStabilityMonitor(every_n_steps=1)
    fit(module, monitor, tmp_path)
    during = monitor.readings[:4]  # the fifth is taken after the last step
    assert [reading.lr[0] for reading in during] == module.used
    for reading in during:
        assert reading.edge_ratio == pytest.approx(9.0 * reading.lr[0] / 2, rel=1e-5)
        assert reading.edge_lr == pytest.approx((2 / 9.0,), rel=1e-5)
        assert not reading.stale


def test_accumulation_measures_once_a_window_and_reads_the_true_loss(tmp_path: Path) -> None:
    losses: list[float] = []

    class Recorded(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss.detach()))
            return loss

    monitor = EdgeOfStabilityMonitor(every_n_steps=1, probe=Probe(samples=1))
    batches = [PROBE, 2 * PROBE, PROBE, 3 * PROBE]
    fit(Recorded(lr=0.01), monitor, tmp_path, batches, accumulate_grad_batches=2, max_epochs=2)
    assert [reading.step for reading in monitor.readings] == [0, 1, 2, 3, 4]
    assert not monitor.readings[0].full_batch
    seen = [loss for _, loss in monitor._fit.losses]
    # The list outside the module also records the evaluations in the sandbox; a step's two losses follow each other.
    means = iter([(a + b) / 2 for a, b in zip(losses, losses[1:], strict=False)])
    assert all(any(math.isclose(loss, mean, rel_tol=1e-6) for mean in means) for loss in seen)
    assert [step for step, _ in monitor._fit.losses] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "batches", "expected"),
    [
        ({}, [PROBE], True),
        ({}, [PROBE, PROBE], False),
        ({"accumulate_grad_batches": 2}, [PROBE, PROBE], True),
        ({"accumulate_grad_batches": 2}, [PROBE] * 4, False),
    ],
    ids=["one-batch", "two-steps", "one-window", "two-windows"],
)
def test_full_batch_is_found_out(settings: Any, batches: Any, expected: bool, tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    fit(Net(), monitor, tmp_path, batches, **settings)
    assert {reading.full_batch for reading in monitor.readings} == {expected}
    assert [reading.batch_sharpness is None for reading in monitor.readings] == [expected] * len(monitor.readings)


def test_alerts_tell_each_change_once(tmp_path: Path) -> None:
    heard: list[Alert] = []
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, alerts=("log", heard.append))
    module = Net(lr=0.1)
    fit(module, monitor, tmp_path)
    assert [alert.verdict for alert in heard] == [Verdict.STABLE]
    assert "edge ratio 0.45" in heard[0].message


def test_loss_that_blows_up_is_diverging(tmp_path: Path) -> None:
    heard: list[Alert] = []

    class Breaking(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if self.trainer.global_step == 2 else 1.0)

    monitor = EdgeOfStabilityMonitor(every_n_steps=10, alerts=(heard.append,))
    fit(Breaking(), monitor, tmp_path)
    assert heard[-1].verdict is Verdict.DIVERGING
    assert heard[-1].step == 2
    assert "not finite" in heard[-1].message


def test_edge_is_announced_beyond_the_limit(tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    fit(Net(lr=0.24), monitor, tmp_path)  # limit 2/9 = 0.222
    assert monitor.readings[0].edge_ratio == pytest.approx(0.24 * 9 / 2, rel=1e-5)
    assert monitor.verdict is Verdict.EDGE
    assert "EDGE from step" in monitor.report()


class Manual(Net):
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        optimizer.step()


class DrawsItself(Net):
    def training_step(self, dataloader_iter: Any) -> torch.Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.net(batch).square().mean()


@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*experimental.*")
@pytest.mark.parametrize(
    ("module", "message"),
    [(Manual, "manual optimization.*loss_fn"), (DrawsItself, "dataloader_iter.*loss_fn")],
    ids=["manual", "dataloader_iter"],
)
def test_a_loss_that_cannot_be_rerun_is_refused_before_training(module: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=message):
        fit(module(), EdgeOfStabilityMonitor(), tmp_path)


def square(module: Any, batch: Any) -> torch.Tensor:
    return module.net(batch).square().mean()


def test_manual_optimization_with_a_loss_fn(tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, loss_fn=square)
    fit(Manual(), monitor, tmp_path)
    assert monitor.readings[-1].edge_ratio == pytest.approx(0.45, rel=1e-5)


def test_loss_fn_goes_before_curvature_loss_before_training_step(tmp_path: Path) -> None:
    class Both(Net):
        def curvature_loss(self, batch: Any) -> torch.Tensor:
            return 2 * self.net(batch).square().mean()

    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match=r"a gradient 0\.5 times its own"):  # it is not the one that is trained
        fit(Both(), monitor, tmp_path)
    assert monitor.readings[0].sharpness == pytest.approx(18.0, rel=1e-5)
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, loss_fn=square)
    fit(Both(), monitor, tmp_path)
    assert monitor.readings[0].sharpness == pytest.approx(9.0, rel=1e-5)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_switched_off_does_nothing(how: str, tmp_path: Path, monkeypatch: Any) -> None:
    if how == "environment":
        monkeypatch.setenv("EOS_MONITOR", "off")
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, enabled=how == "environment")
    fit(Net(), monitor, tmp_path)
    assert monitor.readings == []
    assert list(tmp_path.rglob("eos_readings.jsonl")) == []
    assert monitor.report() == "No reading was taken."


def raising(module: Any, batch: Any) -> torch.Tensor:
    raise RuntimeError("no such luck")


def test_settings_that_cannot_be_read_before_the_step_leave_a_stale_reading(tmp_path: Path, monkeypatch: Any) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(monitored_fit, "edge_ratio_at", fails)
    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="training goes on") as caught:
        trainer = fit(Net(), monitor, tmp_path)
    assert len([w for w in caught if "eos_monitor" in str(w.message)]) == 1
    assert trainer.global_step == 4
    assert [(r.step, r.stale) for r in monitor.readings] == [(step, step < 4) for step in range(5)]
    assert monitor.readings[0].edge_ratio == pytest.approx(0.45, rel=1e-5)


def test_failing_readings_warn_once_and_end_after_three(tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, loss_fn=raising)
    with pytest.warns(UserWarning, match="eos_monitor") as caught:
        trainer = fit(Net(), monitor, tmp_path, max_epochs=8)
    ours = [str(w.message) for w in caught if "eos_monitor" in str(w.message)]
    assert len(ours) == 2
    assert "could not take a reading" in ours[0]
    assert "no such luck" in ours[0]
    assert "stops measuring" in ours[1]
    assert trainer.global_step == 8
    assert monitor.readings == []


def test_dead_logger_and_dead_sink_lose_nothing_else(tmp_path: Path) -> None:
    class Dead(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            raise OSError("disk full")

    def dead(alert: Alert) -> None:
        raise ConnectionError("sink is down")

    monitor = EdgeOfStabilityMonitor(every_n_steps=1, alerts=(dead,))
    logger = Dead(tmp_path)
    with pytest.warns(UserWarning, match="eos_monitor") as caught:
        trainer = fit(Net(), monitor, tmp_path, logger=logger)
    ours = [str(w.message) for w in caught if "eos_monitor" in str(w.message)]
    assert len([m for m in ours if "disk full" in m]) == 1
    assert len([m for m in ours if "sink is down" in m]) == 1
    assert trainer.global_step == 4
    assert len(rows_of(Path(logger.log_dir) / "eos_readings.jsonl")) == 5


def test_fast_dev_run_measures_and_writes_nothing(tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    fit(Net(), monitor, tmp_path, fast_dev_run=True, logger=True)
    assert monitor.readings
    assert list(tmp_path.iterdir()) == []


def test_one_line_at_the_start_tells_the_setup(tmp_path: Path) -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, log = Keep(), logging.getLogger("pytorch_lightning.eos_monitor")
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        fit(Net(), EdgeOfStabilityMonitor(), tmp_path)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    (first,) = [line for line in lines if "loss from" in line]
    for part in ("training_step", "the first 2 training samples", "threshold 2", "products", "5% of the time"):
        assert part in first


def test_a_run_too_short_for_the_budget_still_gets_a_reading(tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(probe=Probe(samples=1000))
    fit(Net(), monitor, tmp_path, [PROBE] * 3, max_epochs=1)
    assert len(monitor.readings) == 1
    assert monitor.readings[0].samples == 6


def test_adam_warms_up_first(tmp_path: Path) -> None:
    class Adam(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    monitor = EdgeOfStabilityMonitor(every_n_steps=10)
    fit(Adam(), monitor, tmp_path, max_epochs=50)
    with_edge = [reading.step for reading in monitor.readings if reading.edge_ratio is not None]
    assert with_edge == [40, 50]  # more than 3 / (1 − 0.9) = 30 steps
    assert all(not reading.ready for reading in monitor.readings if reading.step <= 30)


def test_unknown_optimizer_is_not_guessed(tmp_path: Path) -> None:
    class Lbfgs(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Rprop(self.parameters(), lr=1e-3)

    monitor = EdgeOfStabilityMonitor(every_n_steps=1, solver=Solver(raw_sharpness=True))
    fit(Lbfgs(), monitor, tmp_path)
    assert {reading.edge_ratio for reading in monitor.readings} == {None}
    assert monitor.readings[0].sharpness == pytest.approx(9.0, rel=1e-5)
    assert monitor.verdict is Verdict.UNKNOWN
    assert "no known threshold for Rprop" in monitor.report()


def test_groups_have_their_own_edge_lr_names(tmp_path: Path) -> None:
    class TwoGroups(Net):
        def configure_optimizers(self) -> Any:
            self.extra = nn.Parameter(torch.zeros(1))
            return torch.optim.SGD([{"params": self.net.parameters(), "lr": 0.1}, {"params": [self.extra]}], lr=0.2)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + self.extra.square().sum()

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    fit(TwoGroups(), monitor, tmp_path, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    scale = monitor.readings[0].edge_scale
    assert events.Scalars("eos/edge_lr/lr-SGD/pg1")[0].value == pytest.approx(0.1 * scale, rel=1e-5)
    assert events.Scalars("eos/edge_lr/lr-SGD/pg2")[0].value == pytest.approx(0.2 * scale, rel=1e-5)


def test_state_is_plain_and_survives_a_checkpoint(tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    trainer = fit(Net(lr=0.24), monitor, tmp_path)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"][monitor.state_key]
    json.dumps(state)
    resumed = EdgeOfStabilityMonitor(every_n_steps=1)
    module = Net(lr=0.24)
    seen: list[Verdict] = []

    class Peek(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(resumed.verdict)

    fit(module, resumed, tmp_path, callbacks=[resumed, Peek()], max_epochs=6, ckpt_path=path)
    assert seen == [Verdict.EDGE]
    assert [reading.step for reading in resumed.readings] == [4, 5, 6]


def test_monitor_can_be_pickled_for_spawned_processes() -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=3, loss_fn=square)
    again = pickle.loads(pickle.dumps(monitor))
    assert again._engine.schedule.every_n_steps == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps.*got 0"),
        ({"max_overhead": 0.0}, "max_overhead.*got 0.0"),
        ({"probe": "all"}, "probe.*got 'all'"),
        ({"probe": lambda: Probe(samples=0)}, "samples.*got 0"),
        ({"solver": lambda: Solver(k=0)}, "`k`.*got 0"),
        ({"solver": lambda: Solver(rtol=1.5)}, "rtol.*got 1.5"),
        ({"alerts": "log"}, "alerts.*got 'log'"),
        ({"alerts": ("slack",)}, "alerts.*got"),
        ({"name": "a/b"}, "name.*got 'a/b'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_told_at_once(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EdgeOfStabilityMonitor(**{name: value() if callable(value) else value for name, value in kwargs.items()})


def test_given_batches_and_current_batch_as_probe(tmp_path: Path) -> None:
    given = EdgeOfStabilityMonitor(every_n_steps=1, probe=[2 * PROBE])
    fit(Net(lr=0.01), given, tmp_path)
    assert given.readings[0].sharpness == pytest.approx(36.0, rel=1e-5)
    current = EdgeOfStabilityMonitor(every_n_steps=1, probe="batch")
    fit(Net(lr=0.01), current, tmp_path, [PROBE, 3 * PROBE], max_epochs=1)
    assert [reading.sharpness for reading in current.readings] == pytest.approx([9.0, 81.0], rel=1e-5)


def test_logging_in_the_sandbox_reaches_nobody(tmp_path: Path) -> None:
    class Loud(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.logger.experiment.add_scalar("direct", 1.0, self.global_step)
            assert isinstance(self.logger, pl.loggers.TensorBoardLogger)
            assert Path(self.logger.log_dir).name == "version_0"
            self.print("hello")
            return F.mse_loss(self.net(batch), torch.zeros(2, 1))

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    fit(Loud(), EdgeOfStabilityMonitor(every_n_steps=1), tmp_path, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert len(events.Scalars("direct")) == 4  # one a training step, none from five readings


def test_exposed_metrics_can_stop_a_run_and_are_logged_once(tmp_path: Path) -> None:
    class Logged(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

    monitor = EdgeOfStabilityMonitor(every_n_steps=1, expose_metrics=True)
    stop = pl.callbacks.EarlyStopping("eos/edge_ratio", stopping_threshold=0.5, check_on_train_epoch_end=True)
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    trainer = fit(Logged(lr=0.1), monitor, tmp_path, callbacks=[monitor, stop], logger=logger, max_epochs=10)
    assert trainer.current_epoch == 1  # an edge ratio of 0.45 is below the threshold at once
    assert float(trainer.callback_metrics["eos/edge_ratio"]) == pytest.approx(0.45, rel=1e-5)
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("eos/edge_ratio")] == [0, 1]
    hidden = EdgeOfStabilityMonitor(every_n_steps=1)
    assert not any(key.startswith("eos/") for key in fit(Logged(), hidden, tmp_path).callback_metrics)


def test_a_changed_optimizer_is_noticed_on_resume(tmp_path: Path) -> None:
    class Other(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    trainer = fit(Net(lr=0.24), EdgeOfStabilityMonitor(every_n_steps=1), tmp_path)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["optimizer_states"] = [torch.optim.Adam(Net().parameters()).state_dict()]
    torch.save(checkpoint, path)
    resumed = EdgeOfStabilityMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match=r"trained \[\['SGD', 2\]\].*this one \[\['Adam', 2\]\]"):
        fit(Other(lr=1e-3), resumed, tmp_path, max_epochs=6, ckpt_path=path)
    assert resumed.verdict is Verdict.WARMING_UP


class Tight:
    """A loss that runs out of memory on more than ``most`` samples."""

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, module: Any, batch: Any) -> torch.Tensor:
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("pretended")
        return module.net(batch).square().mean()


@pytest.mark.parametrize(("most", "readings"), [(2, 5), (1, 0)], ids=["half-fits", "half-does-not"])
def test_out_of_memory_halves_the_batches_once(most: int, readings: int, tmp_path: Path) -> None:
    batches = [torch.cat([PROBE, PROBE])]
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, loss_fn=Tight(most))
    if readings:
        fit(Net(lr=0.1), monitor, tmp_path, batches)
        assert monitor.readings[0].sharpness == pytest.approx(9.0, rel=1e-5)
    else:
        with pytest.warns(UserWarning, match=r"pretended|stops measuring"):
            fit(Net(lr=0.1), monitor, tmp_path, batches)
    assert len(monitor.readings) == readings


def test_finite_differences_as_the_method(tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(every_n_steps=2, solver=Solver(method="fd"))
    fit(Net(lr=0.1), monitor, tmp_path)
    assert {reading.method for reading in monitor.readings} == {"fd"}
    # float32 gradients over a step of 1e-3 or 1e-2: some 1e-4
    assert monitor.readings[0].sharpness == pytest.approx(9.0, rel=1e-3)


@pytest.mark.parametrize("when", ["on_fit_start", "on_train_end"])
def test_the_users_own_layout_and_ours_are_both_shown(when: str, tmp_path: Path) -> None:
    """As TensorBoard itself merges what is in the folder, whichever was written first."""
    mine = {"Mine": {"losses": ["Multiline", ["train_loss"]]}}

    class Own(Net):
        pass

    setattr(Own, when, lambda self: self.logger.experiment.add_custom_scalars(mine))
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    watches = [EdgeOfStabilityMonitor(every_n_steps=2), EdgeOfStabilityMonitor(every_n_steps=2)]
    fit(Own(), watches[0], tmp_path, logger=logger, callbacks=watches)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what it vendors
        plugins = importlib.import_module("tensorboard.plugins.custom_scalar.custom_scalars_plugin")
    plugin = plugins.CustomScalarsPlugin(TBContext(data_provider=provider))
    found = json.loads(plugin.layout_impl(RequestContext(), ""))
    charts = {category["title"]: category["chart"] for category in found["category"]}
    assert set(charts) == {"Mine", "Edge of stability", "Edge of stability (eos-2)"}
    assert [chart["title"] for chart in charts["Mine"]] == ["losses"]
    for title, name in (("Edge of stability", "eos"), ("Edge of stability (eos-2)", "eos-2")):
        wanted = custom_scalars_layout(name)[title]
        assert [chart["title"] for chart in charts[title]] == list(wanted)
        assert charts[title][0]["multiline"]["tag"] == wanted[charts[title][0]["title"]][1]


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "together"])
def test_why_a_reading_is_stale_is_told_once_and_kept(apart: bool, tmp_path: Path, caplog: Any) -> None:
    """Rates that are set inside the step: by one factor the reading follows them, apart it says which they were."""

    class Sets(Net):
        def configure_optimizers(self) -> Any:
            other = self.other = nn.Parameter(torch.zeros(1))
            groups = [{"params": self.net.parameters(), "lr": 0.1}, {"params": [other], "lr": 0.2}]
            return torch.optim.SGD(groups)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            step = self.trainer.global_step
            first, second = optimizer.param_groups
            first["lr"] = 0.1 / (3 if apart else 2) ** (step + 1)
            second["lr"] = 0.2 / 2 ** (step + 1)
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + 0.1 * self.other.square().sum()

    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    with caplog.at_level(logging.INFO):
        fit(Sets(), monitor, tmp_path)
    stepped = monitor.readings[:4]
    assert [reading.stale for reading in stepped] == [apart] * 4
    told = [record.getMessage() for record in caplog.records if "not move the verdict" in record.getMessage()]
    if apart:
        assert len(told) == 1
        assert "from 0.1, 0.2 to 0.0333, 0.1" in told[0]
        assert "from 0.0333, 0.1 to 0.0111, 0.05" in stepped[1].notes[-1]
    else:
        assert told == []
        assert [reading.edge_ratio for reading in stepped] == pytest.approx(
            [9.0 * 0.1 / 2 ** (step + 1) / 2 for step in range(4)], rel=1e-4
        )
