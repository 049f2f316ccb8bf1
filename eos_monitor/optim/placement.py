"""Where and when velocities diffuse: the groups of the paper's tables, and its schedule."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

PLACES = ("conv-out", "conv-in", "conv-spatial", "bn-weight", "bn-bias")


def diffusion_groups(module: nn.Module, *places: str, diffusion: float = 1.0, **settings: Any) -> list[dict[str, Any]]:
    """Split the parameters of a module into groups for :class:`APDE`: those that diffuse, and the rest.

    Args:
        module: Module to train.
        places: Rows of the paper's Table 1: ``"conv-out"``, ``"conv-in"``, ``"conv-spatial"`` (directions of the
            weights of convolutions; several make one Laplacian along all of them), ``"bn-weight"``, ``"bn-bias"``.
        diffusion: Share of the largest stable diffusion.
        settings: Other settings of the groups that diffuse, such as ``boundary`` or ``limit``.

    Returns:
        Groups of named parameters, each parameter once; the rest, with ``diffusion=0``, last.

    Raises:
        ValueError: If a place has another name, or the module has no such parameter.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> for group in diffusion_groups(net, "conv-out", "bn-weight"):
        ...     print([name for name, _ in group["params"]], group["diffusion"], group.get("axes"))
        ['0.weight'] 1.0 (0,)
        ['1.weight'] 1.0 (0,)
        ['0.bias', '1.bias'] 0.0 None
    """
    if not places or not set(places) <= set(PLACES):
        raise ValueError(f"Expected some of {', '.join(map(repr, PLACES))}, got {places}.")
    axes_of: dict[Tensor, tuple[str, tuple[int, ...]]] = {}
    found: set[str] = set()
    for part in module.modules():
        for p, kind, axes, used in _diffusing(part, places):
            axes_of.setdefault(p, (kind, axes))
            found |= used
    if found != set(places):
        raise ValueError(f"Expected a module with parameters for {sorted(set(places) - found)}, got none.")

    groups: dict[tuple[str, tuple[int, ...]], list[tuple[str, Tensor]]] = {}
    rest: list[tuple[str, Tensor]] = []
    for name, p in module.named_parameters():
        (groups.setdefault(axes_of[p], []) if p in axes_of else rest).append((name, p))
    several: list[dict[str, Any]] = [
        {**settings, "params": named, "diffusion": diffusion, "axes": axes} for (_, axes), named in groups.items()
    ]
    return [*several, {"params": rest, "diffusion": 0.0}] if rest else several


def _diffusing(part: nn.Module, places: tuple[str, ...]) -> list[tuple[Tensor, str, tuple[int, ...], set[str]]]:
    """Return the parameters of one layer that diffuse: (parameter, kind, axes, places)."""
    if isinstance(part, _ConvNd):
        # Transposed convolutions keep their weights as (in, out, …).
        out = 1 if isinstance(part, _ConvTransposeNd) else 0
        axes = {"conv-out": (out,), "conv-in": (1 - out,), "conv-spatial": tuple(range(2, part.weight.ndim))}
        chosen = [place for place in axes if place in places]
        along = tuple(axis for place in chosen for axis in axes[place])
        return [(part.weight, "conv", along, set(chosen))] if chosen else []
    if isinstance(part, _BatchNorm) and part.affine:
        own = {"bn-weight": part.weight, "bn-bias": part.bias}
        return [(p, place, (0,), {place}) for place, p in own.items() if place in places]
    return []


class LinearDiffusion(LRScheduler):
    """Take the diffusion of all groups linearly to zero.

    A scheduler like torch's own, stepped beside one for the learning rate (which it leaves alone); the paper steps it
    once an epoch, from the largest stable diffusion in the first epoch to none in the last (``total_iters`` = epochs
    − 1).

    Args:
        optimizer: Optimizer with ``diffusion`` in its groups.
        total_iters: Number of its steps after which the diffusion is zero, > 0.
        last_epoch: Index of the last epoch; −1 to begin.

    Raises:
        ValueError: If ``total_iters`` is not positive, or a group has no ``diffusion``.

    References:
        Y. Sun et al., Accelerated PDEs for Construction and Theoretical Analysis of an SGD Extension, 2021, App. D.
    """

    def __init__(self, optimizer: Optimizer, total_iters: int, last_epoch: int = -1) -> None:
        if total_iters <= 0:
            raise ValueError(f"Expected total_iters > 0, got {total_iters}.")
        for group in optimizer.param_groups:
            if "diffusion" not in group:
                raise ValueError(
                    f"Expected an optimizer whose groups have a diffusion, got {type(optimizer).__name__}."
                )
            group.setdefault("initial_diffusion", group["diffusion"])
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates as they are; the diffusion is set."""
        share = max(0.0, 1 - self.last_epoch / self.total_iters)
        for group in self.optimizer.param_groups:
            group["diffusion"] = share * group["initial_diffusion"]
        return [group["lr"] for group in self.optimizer.param_groups]
