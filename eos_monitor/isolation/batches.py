"""Batches of any structure: copied, moved, measured, split."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


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
    """Return the number of samples in a batch: the first dimension that most of what it holds agrees on.

    What it holds are tensors, and lists of samples (images of several sizes, targets as mappings), which count by their
    length. Where as many say one as another, the first tensor decides; :func:`in_doubt` tells.

    Raises:
        ValueError: If the batch holds no tensor with a dimension.
    """
    lengths = _lengths(batch)
    if not lengths:
        raise ValueError(f"Expected a batch with a tensor, got {type(batch).__name__}. Pass `batch_size_fn`.")
    # The first of them, where several are as frequent; a counter has length 1.
    return max(lengths, key=lambda length: (lengths.count(length), length > 1))


def in_doubt(batch: Any) -> bool:
    """Whether parts of a batch disagree about the number of its samples."""
    return len(set(_lengths(batch))) > 1


def is_time_first(module: nn.Module) -> bool:
    """Whether some layer takes its sequences along the first dimension."""
    return any(getattr(m, "batch_first", True) is False for m in module.modules())


def doubt_about_samples(module: nn.Module, batches: Sequence[Any], counted: Sequence[int]) -> str | None:
    """Return why the number of samples may be another one, in words; None where nothing speaks for that.

    Args:
        module: Module that the batches are for.
        batches: The batches.
        counted: Samples in each.
    """
    for batch, samples in zip(batches, counted, strict=True):
        if in_doubt(batch):
            return f"tensors of a batch disagree about its samples ({samples} are counted): pass batch_size_fn"
    if is_time_first(module):
        return "a layer has batch_first=False, so batches are not cut for a sampling error: pass batch_size_fn"
    return None


def _lengths(batch: Any) -> list[int]:
    """Return what each part of a batch says of the number of samples."""
    if isinstance(batch, PackedSequence):
        return [int(batch.batch_sizes[0])]
    if isinstance(batch, Tensor):
        return [batch.shape[0]] if batch.ndim else []
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        if _is_list_of_samples(batch):
            return [len(batch)]
        parts = list(batch)
    elif hasattr(batch, "__dict__") and not isinstance(batch, (type, nn.Module)):
        parts = list(vars(batch).values())
    else:
        return []
    return [length for part in parts for length in _lengths(part)]


def _is_list_of_samples(items: Sequence[Any]) -> bool:
    """Whether a list holds one sample an item: images (channels first), or targets as mappings that differ."""
    if type(items) not in (list, tuple) or not items:
        return False
    if all(isinstance(item, Tensor) and item.ndim == 3 and item.is_floating_point() for item in items):
        return all(item.shape[0] in (1, 3, 4) for item in items) and len({item.shape[0] for item in items}) == 1
    # The targets of detection: boxes and labels, as many as there are objects in the image.
    return all(isinstance(item, Mapping) and any(isinstance(v, Tensor) for v in item.values()) for item in items)


def split_batch(batch: Any, parts: int, smallest: int = 1) -> list[Any] | None:
    """Split a batch into nearly equal parts along the first dimension of its tensors.

    None if they do not share it, if it is not that of the samples, or if a part would have fewer than ``smallest`` of
    them.
    """
    lengths = {t.shape[0] if t.ndim else 0 for t in batch_tensors(batch)}
    length = lengths.pop() if len(lengths) == 1 else 0
    if length < parts * smallest or set(_lengths(batch)) != {length}:
        return None
    bounds = [i * length // parts for i in range(parts + 1)]

    def cut(start: int, end: int) -> Callable[[Any], Any]:
        return lambda leaf: leaf[start:end] if isinstance(leaf, Tensor) else leaf

    return [map_batch(batch, cut(start, end)) for start, end in pairwise(bounds)]
