"""What layer-wise estimates cost, and how good they are: ``python -m tests.benchmarks.cfl`` rewrites docs/cfl.md."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from eos_monitor.cfl.tiers import CFLGauge
from tests.benchmarks.clock import interleaved
from tests.benchmarks.tables import Progress, Table, write
from tests.cfl.layer_nets import COUPLED, NETS, dense_block, layer_weights, states, top_eigenvalue

_ROOT = Path(__file__).parents[2]
_ROUNDS = 5


def _convolutions(depth: int, channels: int = 32, *, norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(channels if i else 3, channels, 3, padding=1)]
        layers += [nn.BatchNorm2d(channels), nn.SiLU()] if norm else [nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 10)
    )


CASES: dict[str, Callable[[], nn.Module]] = {
    "4 convolutions": lambda: _convolutions(4),
    "8 convolutions": lambda: _convolutions(8),
    "MLP": _mlp,
    "4 convolutions, BatchNorm: cut graph": lambda: _convolutions(4, norm=True),
}


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def _problem(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return CASES[name](), (torch.randn(128, 3, 16, 16), torch.randint(0, 10, (128,)))


def costs(progress: Progress) -> Table:
    rows = []
    for name in progress.over(list(CASES)):
        net, batch = _problem(name)
        params, warm, whole = list(net.parameters()), CFLGauge(), CFLGauge()
        one_pass = {"pass": lambda net=net, batch=batch, p=params: torch.autograd.grad(loss(net, batch), p)}

        def nudged(gauge: CFLGauge, refine: bool, net: nn.Module = net, batch: tuple[Tensor, Tensor] = batch) -> object:
            with torch.no_grad():  # as training would: what is warm must not find its own answer
                for p in net.parameters():
                    p.add_(0.02 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0.0)
            return gauge.measure(net, loss, [batch], refine=refine)

        for gauge in (warm, whole):
            gauge.measure(net, loss, [batch])
        actions = {
            "cold": lambda run=nudged: run(CFLGauge(), False),
            "warm": lambda run=nudged, gauge=warm: run(gauge, False),
            "both": lambda run=nudged, gauge=whole: run(gauge, True),
        }
        times = interleaved(one_pass | actions, _ROUNDS)
        idle, work, peak = (_in_child(name, what) for what in ("idle", "pass", "cheap"))
        largest = max(p.numel() for p in params) * 4 * len(batch[0]) / 2**20
        rows.append(
            [
                name,
                *(f"{times[key] / times['pass']:.1f}" for key in actions),
                f"{work - idle:.0f}",
                f"{peak - idle:.0f}",
            ]
            + [f"{largest:.0f}"]
        )
    head = ["net", "cheap, cold", "cheap, warm", "with the exact tier, warm", "pass, MB", "cheap, MB"]
    return Table("cfl-cost", [*head, "one weight a sample would be, MB"], rows)


def quality(progress: Progress) -> Table:
    rows = []
    for name in progress.over(list(NETS)):
        spec, cheap, truth, exact, first = NETS[name], [], [], [], 0
        for _, net in states(name):
            batch = spec.data()
            true = {k: top_eigenvalue(dense_block(net, spec.loss, batch, w)) for k, w in layer_weights(net).items()}
            by_name = {e.layer: e.curvature for e in CFLGauge().measure(net, spec.loss, [batch], refine=False)}
            estimates = CFLGauge().measure(net, spec.loss, [batch])
            exact += [e.curvature / true[e.layer] for e in estimates if e.method == "exact"]
            cheap += [by_name[k] for k in true]
            truth += list(true.values())
            first += max(true, key=lambda k: by_name[k]) == max(true, key=lambda k: true[k])
        ratios = [a / b for a, b in zip(cheap, truth, strict=True)]
        spread = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        kind = "coupled" if name in COUPLED else ""
        rank = f"{spearmanr(cheap, truth)[0]:.3f}"
        rows.append([name, kind, spread, rank, f"{first} of 4", f"{median(exact):.3f} [{min(exact):.3f}]"])
    head = ["net", "", "cheap / true: median [least, most]", "rank correlation", "top layer named"]
    return Table("cfl-quality", [*head, "exact tier, cold / true: median [least]"], rows)


def _in_child(case: str, work: str) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.cfl", case, work]
    return float(subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.split()[-1])


def _peak_of(name: str, work: str) -> float:
    net, batch = _problem(name)
    if work == "pass":
        torch.autograd.grad(loss(net, batch), list(net.parameters()))
    elif work == "cheap":
        CFLGauge().measure(net, loss, [batch], refine=False)
    # Not getrusage: its peak is inherited from the process that forked.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def main() -> None:
    tables = [costs(Progress("cost")), quality(Progress("quality"))]
    for table in tables:
        print(f"\n{table.name}\n{table.markdown()}")
    write(tables, _ROOT / "docs" / "cfl.md")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        print(_peak_of(*sys.argv[1:]))
    else:
        main()
