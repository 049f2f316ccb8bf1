"""How many samples a probe has whose size is left open: one batch first, more where the run has time for it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import EdgeOfStabilityMonitor, Probe, StabilityProbe, measure_stability

PAUSE = 0.02  # seconds a step, some ten times what a reading of one batch takes
FEATURES = 6


class Slow(pl.LightningModule):
    """A small net whose steps take their time somewhere else, in loading say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(PAUSE)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data(samples: int) -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(samples, FEATURES, generator=g), torch.randint(3, (samples,), generator=g))


def fit(callbacks: list[pl.Callback], folder: Path, *, size: int = 32, **settings: Any) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )
    trainer.fit(Slow(), DataLoader(data(512), size, shuffle=True, generator=torch.Generator().manual_seed(2)))


def samples_of(monitor: EdgeOfStabilityMonitor) -> list[int]:
    return [reading.samples for reading in monitor.readings]


def test_a_long_run_of_slow_steps_grows_to_256_samples_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="eos_monitor")
    monitor = EdgeOfStabilityMonitor(max_overhead=1.0, alerts=())

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = bool(monitor.readings) and monitor.readings[-1].samples > 32

    fit([monitor, Stop()], tmp_path, max_steps=100_000)
    found = samples_of(monitor)
    assert found[0] == 32
    assert monitor.readings[0].step == 3  # a step's time is known
    assert found[-1] == 256
    assert sorted(set(found)) == [32, 256]
    assert found == sorted(found)
    assert sum("the probe has grown to the first 256 training samples" in m for m in caplog.messages) == 1
    assert sum("the first 32 training samples, to be more where the budget has room" in m for m in caplog.messages) == 1


@pytest.mark.parametrize(
    ("settings", "monitor_settings", "expected"),
    [
        ({"max_steps": 40}, {"max_overhead": 1e-3}, 32),  # no time for more in so short a run
        ({"max_steps": 36}, {"every_n_steps": 2}, 256),  # whoever sets the cadence has set the cost
        ({"max_steps": 8}, {"probe": Probe(samples=64)}, 64),
        ({"max_epochs": 5, "limit_train_batches": 1}, {"probe": Probe(full_batch=True)}, 32),
    ],
)
def test_size_elsewhere(
    settings: dict[str, Any], monitor_settings: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    monitor = EdgeOfStabilityMonitor(alerts=(), **monitor_settings)
    fit([monitor], tmp_path, **settings)
    assert set(samples_of(monitor)) == {expected}


def test_a_step_of_several_micro_batches_that_is_the_whole_epoch_is_read_whole(tmp_path: Path) -> None:
    monitor = EdgeOfStabilityMonitor(alerts=())
    fit([monitor], tmp_path, size=64, max_epochs=6, accumulate_grad_batches=8, limit_train_batches=8)
    assert set(samples_of(monitor)) == {256}  # four batches of 64: the most that is collected
    assert not any(reading.full_batch for reading in monitor.readings)


def test_batch_sharpness_is_of_all_batches_that_were_collected(tmp_path: Path) -> None:
    """One batch has none with an error, and no verdict on minibatches comes without."""
    monitor = EdgeOfStabilityMonitor(max_overhead=1e-3, alerts=())
    fit([monitor], tmp_path, max_steps=5)
    (reading,) = monitor.readings[:1]
    assert reading.samples == 32
    assert reading.batch_sharpness_error is not None
    module = Slow()
    sgd = torch.optim.SGD(module.parameters(), lr=0.05)
    loader = DataLoader(data(512), 32, shuffle=True, generator=torch.Generator().manual_seed(2))
    seen = []
    for batch, _ in zip(loader, range(reading.step + 1), strict=False):
        seen.append(batch)
        if len(seen) <= reading.step:
            sgd.zero_grad()
            module.training_step(batch, 0).backward()
            sgd.step()
    values = []
    for batch in seen:
        loss = module.training_step(batch, 0)
        params = list(module.parameters())
        gradients = torch.autograd.grad(loss, params, create_graph=True)
        flat = torch.cat([g.flatten() for g in gradients])
        products = torch.autograd.grad(flat @ flat.detach(), params)
        g = flat.detach()
        values.append(float(g @ torch.cat([p.flatten() for p in products]) / g.square().sum()))
    assert reading.batch_sharpness == pytest.approx(sum(values) / len(values), rel=1e-3)


def test_a_plain_loop_starts_with_one_batch_and_grows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 3))
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    x, y = data(512).tensors

    def loss_fn(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    probe = StabilityProbe(net, sgd, loss_fn, max_overhead=1.0, alerts=())
    step = 0
    while step < 300 and (not probe.readings or probe.readings[-1].samples == 32):
        batch = (x[(step * 32) % 512 :][:32], y[(step * 32) % 512 :][:32])
        before = {name: value.clone() for name, value in net.state_dict().items()}
        reading = probe.step(batch)
        if reading is not None and reading.samples == 256:
            net.load_state_dict(before)
            whole = measure_stability(net, loss_fn, [(x[:256], y[:256])], sgd)
            assert reading.edge_ratio == pytest.approx(whole.edge_ratio, rel=0.01)
            assert reading.sampling_error != probe.readings[0].sampling_error
        sgd.zero_grad()
        loss_fn(net, batch).backward()
        sgd.step()
        time.sleep(PAUSE)
        step += 1
    assert [reading.samples for reading in probe.readings][:1] == [32]
    assert probe.readings[-1].samples == 256
