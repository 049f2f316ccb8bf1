"""A loss that exchanges between two gloo processes, with what one of them measures; each writes what it ended with.

python gathering_run.py MONITOR EXCHANGE FOLDER
"""

import gc
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from eos_monitor import CFLMonitor, EdgeOfStabilityMonitor, PerturbationMonitor, Probe, StabilityProbe
from tests.callbacks.runs import CLASSES, FEATURES

STEPS = 12


def gathered(z: Tensor, exchange: str, module: Any) -> Tensor:
    """The outputs of all processes, by one or another function of torch or Lightning."""
    if exchange == "lightning":
        return module.all_gather(z, sync_grads=True).flatten(0, 1)  # type: ignore[no-any-return]
    if exchange == "differentiable":
        return torch.cat(list(dist.nn.functional.all_gather(z)))
    if exchange == "reduce":
        mean = z.detach().mean(0)
        dist.all_reduce(mean)
        return z - mean / 2
    if exchange == "object":
        found: list[Any] = [None, None]
        dist.all_gather_object(found, float(z.detach().sum()))
        return z + 0.0 * sum(found)
    dist.barrier()
    return z


class Net(pl.LightningModule):
    def __init__(self, exchange: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.exchange = exchange

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = gathered(self.net(batch[0]), self.exchange, self)
        return F.cross_entropy(z[: len(batch[1])], batch[1]) + 0.01 * z.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


MONITORS = {
    "without": list,
    "edge": lambda: [EdgeOfStabilityMonitor(every_n_steps=2, probe=Probe(samples=16), alerts=())],
    "cut": lambda: [EdgeOfStabilityMonitor(every_n_steps=2, probe=Probe(samples=16, max_pause=1e-9), alerts=())],
    "grown": lambda: [EdgeOfStabilityMonitor(max_overhead=1.0, alerts=())],
    "cfl": lambda: [CFLMonitor(every_n_steps=2, probe=Probe(samples=16))],
    "perturbation": lambda: [PerturbationMonitor(at_steps=[2, 4], steps=4, every_n_steps=2, probe=Probe(samples=16))],
}


class Slow(pl.Callback):
    """Steps that take their time, and a long run that is ended early."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        time.sleep(0.05)
        trainer.should_stop = trainer.global_step >= 120


def fit(monitor: str, exchange: str, folder: Path) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(96, FEATURES, generator=g), torch.randint(CLASSES, (96,)))
    callbacks = MONITORS[monitor]()  # type: ignore[operator]
    watched = [*callbacks, Slow()] if monitor == "grown" else callbacks
    trainer = pl.Trainer(
        max_steps=100_000 if monitor == "grown" else STEPS,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        callbacks=watched,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    net = Net(exchange)
    trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=4))
    found = {"weights": [p.detach().clone() for p in net.parameters()], "rank": trainer.global_rank, "off": {}}
    for callback in callbacks:
        found["readings"] = getattr(callback, "readings", None)
        found["off"] = dict(callback._engine.guard.off if monitor in ("edge", "cut", "grown") else callback.guard.off)
        found["measured"] = len(getattr(callback, "runs", ())) + len(getattr(callback, "estimates", ()))
    return found


def loop(rank: int, monitor: str, exchange: str, folder: Path) -> None:
    """A plain loop in one of two processes."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # In a function of its own, so that DistributedDataParallel is gone before its group: where its reducer holds the
    # group's last reference, the group ends under the GIL, and waits for ever for a worker that needs it.
    found = trained(rank, monitor, exchange)
    gc.collect()
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()  # gloo aborts a process whose partner has gone first
    dist.destroy_process_group()


def trained(rank: int, monitor: str, exchange: str) -> dict[str, Any]:
    """What a plain loop around DistributedDataParallel ends with."""
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
    )
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    g = torch.Generator().manual_seed(2 + rank)
    batches = [(torch.randn(8, FEATURES, generator=g), torch.randint(CLASSES, (8,), generator=g)) for _ in range(STEPS)]

    def loss_fn(module: Any, batch: Any) -> Tensor:
        z = module(batch[0])
        return F.cross_entropy(z if exchange == "none" else gathered(z, exchange, module)[: len(z)], batch[1])

    probe = None
    if monitor == "probe":
        probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=Probe(samples=8), alerts=())
    readings = []
    for batch in batches:
        if probe is not None:
            reading = probe.step(batch)
            readings.append(reading.edge_ratio if reading else None)
        sgd.zero_grad()
        loss_fn(net, batch).backward()
        sgd.step()
    state = [t.clone() for t in net.state_dict().values()]
    return {"weights": state, "readings": readings, "off": probe.off if probe else {}}


if __name__ == "__main__":
    name, how, where = sys.argv[1:]
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    place = Path(where)
    if name.startswith("loop-"):
        torch.multiprocessing.start_processes(loop, (name[5:], how, place), nprocs=2, start_method="fork")
    else:
        result = fit(name, how, place)
        torch.save(result, place / f"rank{result['rank']}.pt")
