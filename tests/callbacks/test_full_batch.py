"""Whether each step of a Trainer's run uses all of the probe, and nothing else."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from eos_monitor import EdgeOfStabilityMonitor
from eos_monitor.callbacks.trainer_gauge import same_data_each_epoch

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
N = 48
DATA = TensorDataset(torch.arange(N, dtype=torch.float32)[:, None], torch.randint(0, 2, (N,)))


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        return iter(torch.randperm(N).float()[:, None])


# (loader, batches of an epoch)
LOADERS: dict[str, tuple[Callable[[], Any], int]] = {
    "whole": (lambda: DataLoader(DATA, N), 1),
    "whole-shuffled": (lambda: DataLoader(DATA, N, shuffle=True), 1),
    "two-shuffled": (lambda: DataLoader(DATA, N // 2, shuffle=True), 2),
    "limited": (lambda: DataLoader(DATA, 16), 1),
    "limited-shuffled": (lambda: DataLoader(DATA, 16, shuffle=True), 1),
    "dropped-last": (lambda: DataLoader(DATA, 32, shuffle=True, drop_last=True), 1),
    "none-dropped": (lambda: DataLoader(DATA, N, shuffle=True, drop_last=True), 1),
    "replaced": (lambda: DataLoader(DATA, N, sampler=RandomSampler(DATA, replacement=True)), 1),
    "some": (lambda: DataLoader(DATA, N, sampler=RandomSampler(DATA, num_samples=16)), 1),
    "weighted": (lambda: DataLoader(DATA, N, sampler=WeightedRandomSampler([1.0] * N, N)), 1),
    "batch-sampler": (lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), N, False)), 1),
    "random-batch-sampler": (lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 16, False)), 1),
    "pair": (lambda: {"a": DataLoader(DATA, N), "b": DataLoader(DATA, 16, shuffle=True)}, 1),
}


@pytest.mark.parametrize("name", LOADERS)
def test_an_epoch_is_the_same_samples_if_two_epochs_are(name: str) -> None:
    """Against two epochs of the loader itself, as sets."""
    make, batches = LOADERS[name]
    torch.manual_seed(1)
    loaders = make()

    def epoch(loader: Any) -> list[float]:
        taken = [batch[0].flatten() for batch, _ in zip(loader, range(batches), strict=False)]
        return sorted(torch.cat(taken).tolist())

    each = loaders.values() if isinstance(loaders, dict) else [loaders]
    same = all(epoch(loader) == epoch(loader) for loader in each)
    assert same_data_each_epoch(loaders, batches) == same


def test_nobody_knows_what_a_stream_yields_next() -> None:
    assert not same_data_each_epoch(DataLoader(Stream(), N), 1)


@pytest.mark.parametrize(("shuffle", "full"), [(True, False), (False, True)])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_one_batch_an_epoch_of_a_shuffled_set_is_a_sample(
    namespace: str, shuffle: bool, full: bool, tmp_path: Any
) -> None:
    pl = importlib.import_module(namespace)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.1)

    monitor = EdgeOfStabilityMonitor(every_n_steps=1)
    trainer = pl.Trainer(
        max_epochs=3,
        limit_train_batches=1,
        accelerator="cpu",
        callbacks=[monitor],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn(512, 4), torch.randint(0, 2, (512,)))
    trainer.fit(Module(), DataLoader(data, batch_size=64, shuffle=shuffle))
    assert monitor.readings
    assert {reading.full_batch for reading in monitor.readings} == {full}
    assert all((reading.sampling_error == 0.0) == full for reading in monitor.readings)
    assert full or monitor.verdict.name != "STABLE"
