"""ElasticSGD on gloo processes, started as a script; each rank writes what it ended with.

python elastic_run.py WORLD WORKERS ROUNDS FOLDER
"""

import copy
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from eos_monitor.optim import ElasticSGD
from tests.optim.relaxed import make_net, stream, weights

SETTINGS: dict[str, Any] = {"lr": 0.3, "gamma": 2.0, "moving_rate": 0.7, "evaluations": 2, "momentum": 0.9}


def train(
    optimizer: ElasticSGD, net: Any, first_worker: int, rounds: int, evaluations: int = SETTINGS["evaluations"]
) -> list[list[Tensor]]:
    """Run rounds in which each worker has a stream of mini-batches of its own; return the weights after each."""
    workers = optimizer.param_groups[0]["workers"]
    streams = [stream(100 + first_worker + a) for a in range(workers)]

    def closure() -> Tensor:
        assert optimizer.evaluation is not None
        x, y = next(streams[optimizer.evaluation // evaluations])
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    history = []
    for _ in range(rounds):
        optimizer.step(closure)
        history.append(weights(net))
    return history


def work(rank: int, world: int, workers: int, rounds: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    net = make_net(seed=1 + rank)  # the first step sends rank 0's to all
    optimizer = ElasticSGD(net.parameters(), workers=workers, distributed=True, **SETTINGS)
    history = train(optimizer, net, rank * workers, rounds)
    # A second run goes on from a checkpoint of the first.
    net_again = make_net(seed=50 + rank)
    net_again.load_state_dict(net.state_dict())
    again = ElasticSGD(net_again.parameters(), workers=workers, distributed=True, **SETTINGS)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch loads without copying
    resumed = train(again, net_again, rank * workers, 2)
    straight = train(optimizer, net, rank * workers, 2)
    torch.save({"history": history, "resumed": resumed, "straight": straight}, folder / f"rank{rank}.pt")
    dist.barrier()  # gloo aborts a process whose partner has gone first
    dist.destroy_process_group()


if __name__ == "__main__":
    world_size, per_rank, count = map(int, sys.argv[1:4])
    mp.spawn(work, (world_size, per_rank, count, Path(sys.argv[4])), nprocs=world_size)
