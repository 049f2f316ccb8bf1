"""What a step of APDE costs beside torch's own Nesterov SGD, and the memory that it adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from eos_monitor.optim import APDE, diffusion_groups
from tests.benchmarks.clock import interleaved
from tests.benchmarks.tables import Progress, Table

_ROUNDS = 31
PLACES: dict[str, tuple[str, ...]] = {
    "none": (),
    "conv-out": ("conv-out",),
    "conv-in": ("conv-in",),
    "conv-spatial": ("conv-spatial",),
    "conv-out, conv-in": ("conv-out", "conv-in"),
    "bn-weight": ("bn-weight",),
    "bn-weight, bn-bias": ("bn-weight", "bn-bias"),
}


def resnet18() -> nn.ModuleList:
    """The layers of a ResNet-18 for 1000 classes."""
    sizes = [(64, 3, 7)] + 4 * [(64, 64, 3)]
    for n in (128, 256, 512):
        sizes += [(n, n // 2, 3), (n, n // 2, 1)] + 3 * [(n, n, 3)]
    return _layers(sizes, nn.Linear(512, 1000))


def resnet56() -> nn.ModuleList:
    """The layers of the paper's ResNet-56 for CIFAR-10."""
    sizes = [(16, 3, 3)] + 18 * [(16, 16, 3)]
    for n in (32, 64):
        sizes += [(n, n // 2, 3)] + 17 * [(n, n, 3)]
    return _layers(sizes, nn.Linear(64, 10))


NETS: dict[str, Callable[[], nn.ModuleList]] = {"ResNet-18": resnet18, "ResNet-56": resnet56}


def _layers(sizes: list[tuple[int, int, int]], last: nn.Linear) -> nn.ModuleList:
    convolutions = [nn.Conv2d(into, out, kernel, bias=False) for out, into, kernel in sizes]
    return nn.ModuleList([*convolutions, *(nn.BatchNorm2d(out) for out, _, _ in sizes), last])


def optimizer(net: nn.ModuleList, places: tuple[str, ...] | None, foreach: bool | None) -> Any:
    """Nesterov SGD (places: None) or APDE on a net whose gradients are set."""
    for p in net.parameters():
        p.grad = 1e-2 * torch.randn_like(p)
    if places is None:
        return torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, nesterov=True, foreach=foreach)
    groups: Any = diffusion_groups(net, *places, diffusion=0.9) if places else net.parameters()
    return APDE(groups, lr=1e-4, momentum=0.9, foreach=foreach)


def measure(progress: Progress) -> list[Table]:
    rows: dict[str, list[str]] = {place: [] for place in PLACES}
    for net in progress.over(list(NETS)):
        torch.manual_seed(0)
        actions = {"torch": optimizer(NETS[net](), None, True).step}
        for place, places in PLACES.items():
            actions[place] = optimizer(NETS[net](), places, None).step
            actions[f"{place}, foreach"] = optimizer(NETS[net](), places, True).step
        seconds = interleaved(actions, _ROUNDS)
        for place in PLACES:
            rows[place] += [f"{seconds[key] / seconds['torch']:.2f}" for key in (place, f"{place}, foreach")]
    # State and temporaries of the first steps, in copies of the parameters; SGD's own is one, the momentum.
    size = sum(p.numel() for p in resnet18().parameters()) * 4
    base = peak(optimizer(resnet18(), None, True).step)
    for place, places in PLACES.items():
        peaks = [peak(optimizer(resnet18(), places, foreach).step) for foreach in (None, True)]
        rows[place] += [f"{(peak - base) / size:.2f}" for peak in peaks]
    head = ["diffusion", *(f"{net}, {form}" for net in NETS for form in ("default", "foreach"))]
    head += ["memory, default", "memory, foreach"]
    return [Table("optimizers", head, [[place, *cells] for place, cells in rows.items()])]


def peak(step: Callable[[], object]) -> int:
    """Most bytes held at once over three steps, by torch's own account of what it allocates and frees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(3):
            step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
