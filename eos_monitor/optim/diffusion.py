"""The discrete Laplacian along some axes of a tensor, its spectrum, and how much of it a velocity can bear."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

BOUNDARIES = ("neumann", "periodic")
LIMITS = ("exact", "paper")

Axes = str | int | Sequence[str | int]


def resolve_axes(axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the axes of a tensor along which there is something to diffuse, as non-negative integers.

    ``"out"`` is axis 0, ``"in"`` axis 1, ``"spatial"`` all from 2 on: the layout of the weights of ``nn.Linear`` and
    ``nn.Conv*d`` (not of ``nn.ConvTranspose*d``). Axes of length 1 are left out: their Laplacian is zero.

    Raises:
        ValueError: If the tensor has no such axis, or one is named twice.
    """
    several: Sequence[str | int] = [axes] if isinstance(axes, (str, int)) else axes
    named = {"out": [0], "in": [1], "spatial": list(range(2, len(shape))) or [2]}
    found: list[int] = []
    for axis in several:
        if isinstance(axis, str) and axis not in named:
            raise ValueError(f"Expected axes among 'out', 'in', 'spatial' or integers, got {axis!r}.")
        for i in named[axis] if isinstance(axis, str) else [axis]:
            if not -len(shape) <= i < len(shape):
                raise ValueError(
                    f"Expected axes that the tensor has, got {axis!r} for the shape {tuple(shape)}. Put such tensors"
                    " into a group with diffusion=0, or let diffusion_groups choose."
                )
            found.append(i % len(shape))
    if len(set(found)) != len(found) or not found:
        raise ValueError(f"Expected at least one axis, and each once, got {axes!r}.")
    return tuple(i for i in found if shape[i] > 1)


@cache
def largest_eigenvalue(lengths: tuple[int, ...], boundary: str = "neumann") -> float:
    """Return the largest eigenvalue of −∇² on a grid.

    Along an axis of n > 1 points it is 4 cos²(π/2n), and 4 where the highest frequency fits (periodic, even n); axes
    add up. The paper takes 4 for each.

    Args:
        lengths: Number of points along each diffused axis.
        boundary: ``"neumann"`` (the edge value repeated outside) or ``"periodic"``.

    Example:
        >>> largest_eigenvalue((64,), "periodic"), round(largest_eigenvalue((3, 3)), 12)
        (4.0, 6.0)
    """
    return sum(
        4.0 if boundary == "periodic" and n % 2 == 0 else 4 * math.cos(math.pi / (2 * n)) ** 2 for n in lengths if n > 1
    )


def stable_diffusion(
    shape: Sequence[int], axes: Axes, momentum: float, boundary: str = "neumann", limit: str = "exact"
) -> float:
    """Return β_max, the largest β at which v ← γv + β∇²v stays bounded.

    The mode with the eigenvalue −l is multiplied by γ − βl, so that β_max = (1 + γ) / l_max.

    Args:
        shape: Shape of the velocity.
        axes: Axes of the Laplacian: ``"out"``, ``"in"``, ``"spatial"``, integers, or several of them.
        momentum: γ.
        boundary: ``"neumann"`` or ``"periodic"``.
        limit: ``"exact"``, with l_max of this grid, or ``"paper"``, (1 + γ) / 4N with N diffused axes, which is
            smaller where the highest frequency does not fit (by 4/3 for 3×3 kernels).

    Returns:
        β_max; 0 where there is nothing to diffuse (all the axes have length 1).

    References:
        Y. Sun, D. Lao, G. Sundaramoorthi, A. Yezzi, Accelerated PDEs for Construction and Theoretical Analysis of an
        SGD Extension, 2021, (10) and (11).

    Example:
        >>> stable_diffusion((16, 8, 3, 3), "spatial", 0.9, limit="paper")
        0.2375
        >>> round(stable_diffusion((16, 8, 3, 3), "spatial", 0.9) / 0.2375, 6)
        1.333333
    """
    lengths = tuple(shape[i] for i in resolve_axes(axes, shape))
    if not lengths:
        return 0.0
    return (1 + momentum) / (4.0 * len(lengths) if limit == "paper" else largest_eigenvalue(lengths, boundary))


def add_neighbours(g: Tensor, v: Tensor, axes: Sequence[int], boundary: str, beta: float, out: Tensor) -> Tensor:
    """Set ``out`` to g + β·(the sum of the 2N neighbours of each entry of v along ``axes``); axes longer than 1."""
    for k, axis in enumerate(axes):
        n = v.shape[axis]
        first, last = _outside(n, boundary)
        for at, a, b, length in ((1, 0, 2, n - 2), (0, first, 1, 1), (n - 1, n - 2, last, 1)):
            place = out.narrow(axis, at, length)
            a_side = v.narrow(axis, a, length)
            b_side = v.narrow(axis, b, length)
            if k == 0:
                torch.add(a_side, b_side, out=place)
            else:
                place.add_(a_side).add_(b_side)
    return torch.add(g, out, alpha=beta, out=out)


def shifts(n: int, boundary: str) -> Iterator[tuple[int, int, int]]:
    """Yield the four slices (to, from, length) whose sum is that of both neighbours along an axis of n > 1 points."""
    first, last = _outside(n, boundary)
    yield from ((1, 0, n - 1), (0, 1, n - 1), (0, first, 1), (n - 1, last, 1))


def _outside(n: int, boundary: str) -> tuple[int, int]:
    """Return the points whose values stand before the first of n points and behind the last."""
    return (n - 1, 0) if boundary == "periodic" else (0, n - 1)
