"""The optimizers on a smoothed loss in a real Trainer, against the same run in a plain loop."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import EdgeOfStabilityMonitor, Probe
from eos_monitor.callbacks._compat import MisconfigurationException
from eos_monitor.callbacks.fresh_batches import RelaxationGuard, fresh_batch
from eos_monitor.optim import BurgersSGD, ElasticSGD, EntropySGD, HamiltonJacobi, HeatSmoothing
from tests.callbacks import relaxation_run
from tests.launching import run_script
from tests.optim.relaxed import make_net, same, weights

pl = pytorch_lightning
PACKAGES = {"pytorch_lightning": pytorch_lightning, "lightning": lightning.pytorch}

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "entropy": lambda params: EntropySGD(
        params, evaluations=4, temperature=1e-5, generator=torch.Generator().manual_seed(3)
    ),
    "hamilton-jacobi": lambda params: HamiltonJacobi(params, evaluations=3, momentum=0.9),
    "heat": lambda params: HeatSmoothing(params, evaluations=3, generator=torch.Generator().manual_seed(3)),
    "burgers": lambda params: BurgersSGD(params, evaluations=4),
    "elastic": lambda params: ElasticSGD(params, workers=2, evaluations=2),
}


def data(samples: int = 48) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(samples, 5, generator=g, dtype=torch.float64), torch.randint(3, (samples,), generator=g)
    )


def make_module(package: Any, build: Callable[[Any], Any], schedule: bool = False) -> Any:
    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()
            self.seen: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = fresh_batch(self, batch)
            self.seen.append(x)
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            optimizer = build(self.parameters())
            if not schedule:
                return optimizer
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def make_trainer(package: Any, folder: Path, **settings: Any) -> Any:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return package.Trainer(**{**defaults, **settings})


def fit(
    build: Callable[[Any], Any],
    folder: Path,
    package: Any = pl,
    size: int = 12,
    schedule: bool = False,
    **settings: Any,
) -> Any:
    module = make_module(package, build, schedule)
    make_trainer(package, folder, **settings).fit(module, DataLoader(data(), batch_size=size))
    return module


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("package", PACKAGES)
def test_run_is_that_of_the_plain_loop(name: str, package: str, tmp_path: Path) -> None:
    module = fit(OPTIMIZERS[name], tmp_path, PACKAGES[package], callbacks=[RelaxationGuard()], schedule=True)
    net = make_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen = []
    for _ in range(2):
        for x, y in DataLoader(data(), batch_size=12):
            # 12 samples in parts of a size that divides them
            size = 12 // optimizer.closure_calls
            mini = iter([(x[i : i + size], y[i : i + size]) for i in range(0, 12, size)])

            def closure(mini: Any = mini) -> Tensor:
                a, b = next(mini)
                seen.append(a)
                optimizer.zero_grad()
                loss = F.cross_entropy(net(a), b)
                loss.backward()
                return loss

            optimizer.step(closure)
            scheduler.step()
    assert same(module.seen, seen)
    assert same(weights(module.net), weights(net))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    straight = fit(OPTIMIZERS[name], tmp_path, max_epochs=4)
    module = make_module(pl, OPTIMIZERS[name])
    trainer = make_trainer(pl, tmp_path)
    trainer.fit(module, DataLoader(data(), batch_size=12))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_module(pl, OPTIMIZERS[name])
    make_trainer(pl, tmp_path, max_epochs=4).fit(
        resumed, DataLoader(data(), batch_size=12), ckpt_path=tmp_path / "half.ckpt"
    )
    assert same(weights(resumed.net), weights(straight.net))
    assert not same(weights(resumed.net), weights(module.net))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_monitor_changes_nothing_and_reads_the_whole_batch(name: str, tmp_path: Path) -> None:
    without = fit(OPTIMIZERS[name], tmp_path)
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, alerts=(), probe=Probe(samples=12))
    with_it = fit(OPTIMIZERS[name], tmp_path, callbacks=[monitor])
    assert same(weights(with_it.net), weights(without.net))
    assert same(with_it.seen, without.seen)
    ratios = [reading.edge_ratio for reading in monitor.readings]
    assert len(ratios) >= 7
    assert None not in ratios
    assert {reading.samples for reading in monitor.readings} == {12}


def test_gradients_are_clipped_at_each_evaluation(tmp_path: Path) -> None:
    norms: list[float] = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms.append(len(pl_module.seen))

    module = fit(OPTIMIZERS["hamilton-jacobi"], tmp_path, gradient_clip_val=1e-3, callbacks=[Watch()])
    assert norms == list(range(1, 8 * 3 + 1))
    square = sum(float(p.grad.square().sum()) for p in module.net.parameters())
    assert square**0.5 <= 1e-3 * (1 + 1e-9)


def test_batch_of_other_optimizers_stays_whole(tmp_path: Path) -> None:
    module = fit(lambda params: torch.optim.SGD(params, lr=0.1), tmp_path, callbacks=[RelaxationGuard()])
    assert [len(x) for x in module.seen] == [12] * 8


def test_batch_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cut into 20 mini-batches .* times 20, with drop_last=True"):
        fit(EntropySGD, tmp_path)


def test_bf16_runs(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast speaks about float64
        module = fit(OPTIMIZERS["hamilton-jacobi"], tmp_path, precision="bf16-mixed", callbacks=[RelaxationGuard()])
    assert not same(weights(module.net), weights(make_net()))


# ---- what is refused


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("package", PACKAGES)
def test_accumulation_is_refused_before_the_first_step(name: str, package: str, tmp_path: Path) -> None:
    module = make_module(PACKAGES[package], OPTIMIZERS[name])
    trainer = make_trainer(PACKAGES[package], tmp_path, accumulate_grad_batches=2, callbacks=[RelaxationGuard()])
    with pytest.raises(MisconfigurationException, match=r"accumulate_grad_batches=1 with \w+, got 2: each of the"):
        trainer.fit(module, DataLoader(data(), batch_size=12))
    assert module.seen == []


def test_accumulation_to_come_is_refused(tmp_path: Path) -> None:
    later = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    with pytest.raises(MisconfigurationException, match="got 4"):
        fit(OPTIMIZERS["heat"], tmp_path, callbacks=[RelaxationGuard(), later])


def test_accumulation_is_refused_without_the_callback_too(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="got 2"):
        fit(OPTIMIZERS["heat"], tmp_path, accumulate_grad_batches=2)


def test_accumulation_with_other_optimizers_is_none_of_its_business(tmp_path: Path) -> None:
    module = fit(
        lambda params: torch.optim.SGD(params, lr=0.1),
        tmp_path,
        accumulate_grad_batches=2,
        callbacks=[RelaxationGuard()],
    )
    assert len(module.seen) == 8


def guard(optimizer: Any, **trainer: Any) -> None:
    """Show the guard a trainer that this machine cannot have."""
    stand_in = {
        "optimizers": [optimizer],
        "callbacks": [],
        "accumulate_grad_batches": 1,
        "world_size": 1,
        "precision": "32-true",
        "precision_plugin": SimpleNamespace(),
        **trainer,
    }
    RelaxationGuard().on_fit_start(SimpleNamespace(**stand_in), SimpleNamespace(automatic_optimization=True))


def one() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(1))]


def test_gradient_scaler_is_refused() -> None:
    guard(HamiltonJacobi(one()), precision_plugin=SimpleNamespace(scaler=None))
    with pytest.raises(MisconfigurationException, match="got '16-mixed': Lightning then calls"):
        guard(HamiltonJacobi(one()), precision="16-mixed", precision_plugin=SimpleNamespace(scaler=object()))


@pytest.mark.parametrize(
    "noisy",
    [
        lambda **kw: EntropySGD(one(), temperature=1e-5, **kw),
        lambda **kw: HeatSmoothing(one(), **kw),
        lambda **kw: BurgersSGD(one(), viscosity=1e-5, **kw),
    ],
    ids=["entropy", "heat", "burgers"],
)
def test_noise_of_several_processes_needs_a_generator(noisy: Any) -> None:
    with pytest.raises(MisconfigurationException, match="a generator in 2 processes, got None"):
        guard(noisy(), world_size=2)
    guard(noisy(), world_size=1)
    guard(noisy(generator=torch.Generator()), world_size=2)


def test_several_processes_without_noise_need_none() -> None:
    for optimizer in (EntropySGD(one()), HamiltonJacobi(one()), HeatSmoothing(one(), gamma=0.0), BurgersSGD(one())):
        guard(optimizer, world_size=2)


def test_distributed_workers_are_refused_where_gradients_are_averaged() -> None:
    with pytest.raises(MisconfigurationException, match="got distributed=True: the Trainer averages"):
        guard(ElasticSGD(one(), distributed=True), world_size=2)
    guard(ElasticSGD(one()), world_size=2)


def test_manual_optimization_steps_with_its_own_closure(tmp_path: Path) -> None:
    class Manual(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = make_net()
            self.calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                x, y = fresh_batch(self, batch)
                assert len(x) == 4
                self.calls += 1
                optimizer.zero_grad()
                loss = F.cross_entropy(self.net(x), y)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

        def configure_optimizers(self) -> Any:
            return HamiltonJacobi(self.parameters(), evaluations=3, momentum=0.9)

    module = Manual()
    make_trainer(pl, tmp_path, callbacks=[RelaxationGuard()]).fit(module, DataLoader(data(), batch_size=12))
    assert module.calls == 8 * 3
    automatic = fit(OPTIMIZERS["hamilton-jacobi"], tmp_path)
    assert same(weights(module.net), weights(automatic.net))


@pytest.mark.slow
def test_ddp_is_one_process_on_the_union_of_the_mini_batches(tmp_path: Path) -> None:
    run_script(relaxation_run.__file__, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second)
    net = make_net()
    optimizer = HeatSmoothing(
        net.parameters(), gamma=1e-2, evaluations=3, generator=torch.Generator().manual_seed(3), momentum=0.9
    )
    x, y = relaxation_run.data().tensors
    for epoch in range(2):
        # DistributedSampler: samples shuffled by the epoch, every other one to each rank
        order = torch.randperm(48, generator=torch.Generator().manual_seed(epoch))
        shards = [order[rank::2].split(12) for rank in (0, 1)]
        for step in range(2):

            def closure(step: int = step, shards: Any = shards) -> Tensor:
                k = optimizer.evaluation
                assert k is not None
                chosen = torch.cat([shard[step][4 * k : 4 * k + 4] for shard in shards])
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x[chosen]), y[chosen])
                loss.backward()
                return loss

            optimizer.step(closure)
    for ours, theirs in zip(weights(net), first, strict=True):
        # the mean of two means against one mean, a few roundings in each of 4 steps
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
