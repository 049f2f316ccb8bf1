"""What a reading in a Lightning run has beside the edge ratio: batch sharpness, directional ratio, the scheduled."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import EdgeOfStabilityMonitor, Probe, Solver
from tests.callbacks.runs import logs_of

SAMPLES, BATCH = 32, 4


def data() -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(SAMPLES, 5, generator=g), torch.randn(SAMPLES, 1, generator=g))


class Regression(pl.LightningModule):
    """Linear least squares, whose Hessian does not depend on where it is taken."""

    def __init__(self, optimizers: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.optimizers_of = nn.Linear(5, 1, bias=False), optimizers
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


def fit(
    folder: Path,
    optimizers: Any,
    *,
    batch_size: int = BATCH,
    epochs: int = 2,
    trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Any, EdgeOfStabilityMonitor, list[dict[str, Any]]]:
    monitor = EdgeOfStabilityMonitor(**{"every_n_steps": 1, "probe": Probe(samples=SAMPLES), "alerts": (), **settings})
    runner = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[monitor],
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accumulate_grad_batches": 2, **(trainer or {})},
    )
    module = Regression(optimizers)
    runner.fit(module, DataLoader(data(), batch_size=batch_size))
    rows = [json.loads(line) for line in (logs_of(folder) / "eos_readings.jsonl").read_text().splitlines()]
    return module, monitor, rows


def sgd(module: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), **{"lr": 0.01, **settings})


def test_batch_sharpness_is_that_of_the_probes_steps(tmp_path: Path) -> None:
    """A step's batch is two micro-batches; by hand: H_B = 2/n XᵀX on the eight samples of each."""
    module, monitor, rows = fit(tmp_path, lambda m: sgd(m, momentum=0.5))
    reading, x, y = monitor.readings[-1], *data().tensors
    w = module.net.weight.detach().double()
    ratios = []
    for start in range(0, SAMPLES, 2 * BATCH):
        part, target = x[start : start + 2 * BATCH].double(), y[start : start + 2 * BATCH].double()
        g = 2 / len(part) * part.T @ (part @ w.T - target)
        ratios.append(float((g.T @ (2 / len(part) * part.T @ part) @ g) / (g.T @ g)))
    ratios = torch.tensor(ratios)
    assert reading.batch_sharpness == pytest.approx(float(ratios.mean()), rel=1e-4)
    assert reading.batch_sharpness_error == pytest.approx(float(ratios.std() / 2), rel=1e-3)
    assert reading.batch_sharpness_limits == pytest.approx((100.0, 300.0))
    assert rows[-1]["batch_sharpness"] == reading.batch_sharpness


def test_full_batch_runs_have_no_batch_sharpness(tmp_path: Path) -> None:
    _, monitor, _ = fit(tmp_path, sgd, batch_size=SAMPLES)
    assert monitor.readings[-1].full_batch
    assert monitor.readings[-1].batch_sharpness is None


def test_optimizer_without_a_threshold_gets_the_directional_ratio(tmp_path: Path) -> None:
    _, monitor, _ = fit(tmp_path, lambda m: torch.optim.Rprop(m.parameters(), lr=1e-3))
    first = monitor.readings[0]
    assert first.edge_ratio is None
    # The sign step of 1e-3 from far away: hardly any curvature along it.
    assert first.directional_ratio is not None
    assert 0.0 < first.directional_ratio < 0.1


def test_known_optimizers_do_not_pay_for_it(tmp_path: Path) -> None:
    _, monitor, _ = fit(tmp_path, sgd)
    assert all(reading.directional_ratio is None for reading in monitor.readings)


def scheduled(module: Any, make: Any, **entry: Any) -> Any:
    optimizer = sgd(module, momentum=0.9)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step", **entry}}


@pytest.mark.parametrize(
    ("make", "entry"),
    [
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=50), {}),
        (lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [6], gamma=5.0), {}),
        (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), {"interval": "epoch"}),
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5), {"frequency": 4}),
    ],
    ids=["one-cycle", "jump", "epochs", "frequency"],
)
def test_next_edge_ratio_is_what_the_next_step_reads(tmp_path: Path, make: Any, entry: dict[str, Any]) -> None:
    """The Hessian is constant, so that only the settings change; OneCycle moves the momentum too."""
    # A micro-batch number that `frequency` counts is not a step: lightning counts batches there.
    _, monitor, _ = fit(tmp_path, lambda m: scheduled(m, make, **entry), epochs=3, solver=Solver(rtol=1e-7))
    readings = [reading for reading in monitor.readings if reading.edge_ratio_next is not None]
    assert len(readings) == 8  # the first epoch fills the probe
    pairs = [(before.edge_ratio_next, after.edge_ratio) for before, after in zip(readings, readings[1:], strict=False)]
    assert len({round(now, 6) for _, now in pairs}) > 1
    # float32 products.
    assert [ahead for ahead, _ in pairs] == pytest.approx([now for _, now in pairs], rel=1e-5)


def test_nothing_is_foreseen_without_a_schedule(tmp_path: Path) -> None:
    _, monitor, _ = fit(tmp_path, sgd)
    assert all(reading.edge_ratio_next is None for reading in monitor.readings)


def test_a_scheduler_that_cannot_be_foreseen_is_told_once_and_harms_nothing(tmp_path: Path) -> None:
    class Secretive(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float]:
            return [group["lr"] for group in self.optimizer.param_groups]

        def __copy__(self) -> Any:
            raise RuntimeError("no copies")

    _, monitor, _ = fit(tmp_path, lambda m: scheduled(m, Secretive))
    assert all(reading.edge_ratio_next is None for reading in monitor.readings)
    assert all(reading.edge_ratio is not None for reading in monitor.readings)


def test_clipping_gives_a_second_ratio(tmp_path: Path) -> None:
    """The norm is that of the whole gradient: here of the mean over all 32 samples."""
    clip = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 1}
    module, monitor, rows = fit(tmp_path, sgd, batch_size=SAMPLES, epochs=3, trainer=clip)
    x, y = (part.double() for part in data().tensors)
    torch.manual_seed(1)
    w = nn.Linear(5, 1, bias=False).weight.detach().double()
    for reading in monitor.readings[:2]:
        gradient = 2 / SAMPLES * (x @ w.T - y).T @ x
        factor = min(1.0, 0.05 / float(gradient.norm()))
        assert factor < 0.5
        assert reading.edge_ratio_clipped == pytest.approx(factor * reading.edge_ratio, rel=1e-4)
        w = w - 0.01 * factor * gradient
    assert rows[0]["edge_ratio_clipped"] == monitor.readings[0].edge_ratio_clipped


@pytest.mark.parametrize(
    ("optimizers", "clip"),
    [
        (sgd, {}),
        (sgd, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}),
        (lambda m: torch.optim.Adam(m.parameters()), {"gradient_clip_val": 0.05}),
    ],
    ids=["none", "by-value", "adam"],
)
def test_without_clipping_by_the_norm_of_sgd_there_is_none(tmp_path: Path, optimizers: Any, clip: Any) -> None:
    _, monitor, _ = fit(tmp_path, optimizers, trainer=clip)
    assert all(reading.edge_ratio_clipped is None for reading in monitor.readings)
