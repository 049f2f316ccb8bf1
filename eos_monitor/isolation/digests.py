"""Digests of single values: equal as long as the value is."""

from __future__ import annotations

import functools
import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_WORDS = 2**20  # that are weighted at a time
_SCALARS = (type(None), bool, int, str, bytes, range, slice, torch.dtype, torch.device, type(Ellipsis))


def scalar_digest(value: Any) -> Any:
    """Return what a plain value is compared by; None for everything else."""
    kind = type(value)
    if kind in _SCALARS:
        return kind, value
    if kind in (float, complex):
        return kind, repr(value)  # NaN is itself, −0 is not 0
    if issubclass(kind, np.generic) and not issubclass(kind, np.object_):
        return kind, value.tobytes()
    return None


def key_digest(value: Any) -> Any:
    """Return what a key or an entry of a set is compared by: its value if it is plain, else its identity."""
    if type(value) is tuple and all(map(scalar_digest, value)):
        return value
    return scalar_digest(value) or id(value)


def generator_digest(value: Any) -> Any:
    """Return the state of a random generator; None for everything else."""
    kind = type(value)
    if issubclass(kind, torch.Generator):
        return frozen(value.get_state())
    if issubclass(kind, np.random.Generator):
        return frozen(value.bit_generator.state)
    if issubclass(kind, np.random.BitGenerator):
        return frozen(value.state)
    if issubclass(kind, np.random.RandomState):
        return frozen(value.get_state(legacy=False))
    if issubclass(kind, random.Random):
        return random.Random.getstate(value)
    return None


def frozen(value: Any) -> Any:
    """Return the state of a generator as what can be compared with ==."""
    if isinstance(value, dict):
        return tuple((key, frozen(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(frozen, value))
    return bytes_digest(value) if isinstance(value, (np.ndarray, Tensor)) else value


def bytes_digest(array: Any) -> bytes:
    """Digest an array."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.blake2b(flat.data, digest_size=16).digest()


def word_sum(data: Tensor) -> int:
    """Sum a byte tensor's 32-bit words, each times a random odd number, modulo 2⁶⁴; computed where the tensor is."""
    if data.storage_offset() % 4:
        data = data.clone()  # words start at multiples of four
    words = nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)
    weights = _weights(_WORDS, data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for part in torch.split(words, _WORDS):
        # Odd factors can be divided by, so that a single changed word always shows.
        total = total * 6364136223846793005 + (part.long() * weights[: part.numel()]).sum()
    return int(total)


@functools.lru_cache(maxsize=16)  # one a device
def _weights(n: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (n,), generator=generator, device="cpu").mul(2).add(1).to(device)


def content_digest(value: Tensor) -> Any:
    """Digest a tensor's content; None if it is not laid out as bytes."""
    value = value.detach()
    if value.layout == torch.sparse_coo:
        return content_digest(value._indices()), content_digest(value._values())
    if value.device.type == "meta":
        return "meta"
    try:
        data = value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    except (RuntimeError, NotImplementedError):
        return None  # quantized, nested, sharded
    return bytes_digest(data.numpy()) if data.device.type == "cpu" else word_sum(data)
