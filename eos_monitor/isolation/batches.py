"""Batches of any structure: copied, moved, measured, split."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def map_batch(batch: Any, leaf: Callable[[Any], Any]) -> Any:
    """Apply ``leaf`` to everything in a batch that is not itself a built-in container, mapping or dataclass."""
    if isinstance(batch, MutableMapping):
        mapped = copy.copy(batch)
        for key, value in batch.items():
            mapped[key] = map_batch(value, leaf)
        return mapped
    if type(batch) in (list, tuple) or hasattr(batch, "_fields"):
        items = [map_batch(item, leaf) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if is_dataclass(batch) and not isinstance(batch, type):
        duplicate: Any = copy.copy(batch)
        for field in fields(batch):
            object.__setattr__(duplicate, field.name, map_batch(getattr(batch, field.name), leaf))
        return duplicate
    return leaf(batch)


def clone_batch(batch: Any) -> Any:
    """Copy a batch deeply; tensors that require a gradient become leaves, those of inference mode ordinary ones."""
    return map_batch(batch, _clone)


def _clone(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    # Collocation points: the loss differentiates by them.
    return value.detach().clone().requires_grad_(value.requires_grad)


def move_batch(batch: Any, device: torch.device | str) -> Any:
    """Move whatever has a ``to`` method."""
    return map_batch(batch, lambda x: x.to(device) if hasattr(x, "to") else x)


def batch_tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch in order of appearance, those behind attributes of unknown objects last."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from batch_tensors(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        for value in batch:
            yield from batch_tensors(value)
    elif hasattr(batch, "__dict__") and not isinstance(batch, (type, nn.Module)):
        yield from batch_tensors(vars(batch))


def batch_size(batch: Any) -> int:
    """Return the first dimension of the batch's first tensor.

    Raises:
        ValueError: If the batch holds no tensor with a dimension.
    """
    for tensor in batch_tensors(batch):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise ValueError(f"Expected a batch with a tensor, got {type(batch).__name__}. Pass `batch_size_fn`.")


def split_batch(batch: Any, parts: int, smallest: int = 1) -> list[Any] | None:
    """Split a batch into nearly equal parts along the first dimension of its tensors.

    None if they do not share it, or if a part would have fewer than ``smallest`` samples.
    """
    lengths = {t.shape[0] if t.ndim else 0 for t in batch_tensors(batch)}
    length = lengths.pop() if len(lengths) == 1 else 0
    if length < parts * smallest:
        return None
    bounds = [i * length // parts for i in range(parts + 1)]

    def cut(start: int, end: int) -> Callable[[Any], Any]:
        return lambda leaf: leaf[start:end] if isinstance(leaf, Tensor) else leaf

    return [map_batch(batch, cut(start, end)) for start, end in pairwise(bounds)]
