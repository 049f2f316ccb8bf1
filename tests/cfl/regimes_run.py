"""One of two gloo processes that count the regimes of their own batches; writes what both together compute.

python regimes_run.py RANK FOLDER
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eos_monitor.cfl.regimes import ActivationRegimes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.hidden = nn.Linear(12, 8)
        self.rare = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(F.relu(self.conv(x)).flatten(1)))
        if float(x.mean()) > 0.5:  # on one of the two processes only
            h = F.silu(self.rare(h))
        return self.head(h)


def loss(module: Any, batch: Any) -> Tensor:
    return module(batch).square().mean()


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(rank: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(10 + rank)
    return [torch.randn(n, 2, 6, generator=g) + rank for n in ((5, 3) if rank == 0 else (7, 2))]


def main(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    regimes = ActivationRegimes(net())
    for batch in batches(rank):
        regimes.update(loss, batch)
    shares = {layer: torch.stack(list(found)) for layer, found in regimes.compute().items()}
    torch.save({"shares": shares, "reasons": regimes.not_attributed}, folder / f"rank{rank}.pt")
    torch.distributed.barrier()  # gloo aborts a process whose partner has gone first
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
