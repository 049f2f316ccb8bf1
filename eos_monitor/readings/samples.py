"""The data that readings are taken on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from eos_monitor.isolation.batches import batch_size, batch_tensors, clone_batch, move_batch, split_batch
from eos_monitor.isolation.sandbox import preserve_rng
from eos_monitor.readings.settings import Probe

_MAX_BYTES = 256 * 2**20
_MOST_SAMPLES = 256  # where the number is ours to choose
HALVED = (
    "memory ran out, and since then readings are of halved batches, which is another loss where that is "
    "no mean over samples; a probe of smaller batches avoids this"
)


class ProbeSamples:
    """Batches to measure on: fixed ones from the start of training, the current one, or the user's own.

    Args:
        probe: What to collect. The fixed ones are kept until there are enough samples, or 256 MB.

    Attributes:
        batches: What was collected, or given and read.
        seen: Number of training batches collected, slices of one counted once.
        halved: Whether memory ran out, so that the batches are halves of what was collected.
    """

    def __init__(self, probe: Probe) -> None:
        self.kind = probe.batches if isinstance(probe.batches, str) else "given"
        self.batches: list[Any] = []
        self.seen = 0
        self._sizes: list[int] = []  # of what was collected
        self._in_use: int | None = None  # batches that readings are taken on; None for all
        self._cut = False  # a batch was collected in part
        self._settled = False  # how many of them
        self._source = None if isinstance(probe.batches, str) else probe.batches
        self._chosen = probe.samples is None
        self._wanted = _MOST_SAMPLES if probe.samples is None else probe.samples
        self._batch_size = probe.batch_size_fn or batch_size
        self._bytes = 0
        self._closed = False
        self.halved = False

    @property
    def full(self) -> bool:
        """Whether readings can be taken."""
        started = self._in_use is not None and len(self.batches) >= self._in_use
        return not self.collecting or started

    @property
    def collecting(self) -> bool:
        """Whether training batches are still wanted."""
        return self.kind == "fixed" and not self._closed and not self._enough()

    @property
    def samples(self) -> int:
        """Number of samples that readings are taken on, of those collected."""
        return sum(self._sizes[: self._in_use])

    @property
    def whole(self) -> bool:
        """Whether no batch was cut short."""
        return not self._cut and not self.halved

    @property
    def complete(self) -> bool:
        """Whether readings are taken on all that was collected, and that is whole."""
        return self.whole and not self.batches[self._first :]

    @property
    def small(self) -> bool:
        """Whether readings are taken on the first batch, until :meth:`grow`."""
        return self._in_use is not None and not self._settled

    @property
    def _first(self) -> int:
        """The first batch that readings are not taken on."""
        return len(self.batches) if self._in_use is None else self._in_use

    def start_small(self) -> None:
        """Take readings on the first batch until :meth:`grow`, where the number of samples is not given."""
        if self._chosen and self.kind == "fixed":
            self._in_use = 1

    def grow(self, factor: float) -> float:
        """Use up to ``factor`` times as many batches as so far, and collect no more; return the factor in effect."""
        if self._in_use is None or not self.batches:
            return 1.0
        before = self._in_use
        self._in_use = max(before, min(len(self.batches), int(factor * before)))
        self._settled = True
        self.close()
        return self._in_use / before

    def share(self, processes: int) -> None:
        """Collect this process's part of the samples only."""
        self._wanted = -(-self._wanted // processes)

    def observe(self, batch: Any) -> None:
        """Offer the next training batch."""
        if self.collecting:
            # Copied before the training step can edit it in place.
            for piece in _slices(batch):
                if self._enough():
                    self._cut = True
                    break
                kept = move_batch(clone_batch(piece), "cpu")
                self.batches.append(kept)
                self._sizes.append(self._batch_size(kept))
                self._bytes += _bytes(kept)
            self.seen += 1

    def halve(self) -> bool:
        """Split every batch in two, once; False if that was done before, or cannot be."""
        halves = [split_batch(batch, 2) for batch in self.batches]
        if self.halved or not halves or any(pair is None for pair in halves):
            return False
        self.batches = [half for pair in halves for half in pair or ()]
        self._sizes = [self._batch_size(half) for half in self.batches] if self.kind == "fixed" else []
        self._in_use = None if self._in_use is None else 2 * self._in_use
        self.halved = True
        return True

    def close(self) -> None:
        """Make do with the batches collected so far: an epoch or the run is over."""
        self._closed = self._closed or bool(self.batches)

    def on(self, device: torch.device, current: Any) -> list[Any]:
        """Return the batches for a reading, on ``device``; ``current`` is the batch of the step to come."""
        if self.kind == "batch":
            return [] if current is None else [current]
        if self._source is not None and not self.batches:
            with preserve_rng():
                self.batches = self._given(self._source)
        return [move_batch(batch, device) for batch in self.batches[: self._in_use]]

    def others(self, device: torch.device) -> Iterator[Any]:
        """Yield the training batches that were collected beside those for a reading, on ``device``."""
        return (move_batch(batch, device) for batch in self.batches[self._first :])

    def _given(self, source: Iterable[Any]) -> list[Any]:
        """Return all batches of a source that has an end, and as many as are wanted of one that may have none."""
        if _has_end(source):
            return list(source)
        taken = []
        for batch in source:
            taken.append(batch)
            self._sizes.append(self._batch_size(batch))
            if sum(self._sizes) >= self._wanted:
                break
        return taken

    def _enough(self) -> bool:
        return sum(self._sizes) >= self._wanted or self._bytes >= _MAX_BYTES

    def describe(self) -> str:
        """Return the probe in words."""
        if self.kind == "batch":
            return "the current batch"
        if self.kind == "given":
            return "the batches given"
        growing = ", to be more where the budget has room" if self.small else ""
        return f"the first {self.samples} training samples{growing}"


def _has_end(source: Iterable[Any]) -> bool:
    try:
        len(source)  # type: ignore[arg-type]
    except TypeError:  # an iterator, or a loader of an iterable data set
        return False
    return True


def _bytes(batch: Any) -> int:
    return sum(t.numel() * t.element_size() for t in batch_tensors(batch))


def _slices(batch: Any) -> list[Any]:
    """Cut a batch that is over the memory limit along the dimension that all its tensors share."""
    parts = -(-_bytes(batch) // _MAX_BYTES)
    if parts <= 1:
        return [batch]
    pieces = split_batch(batch, parts)
    if pieces is None:
        first = sorted({t.shape[0] if t.ndim else 0 for t in batch_tensors(batch)})
        raise ValueError(
            f"Expected a batch of at most {_MAX_BYTES >> 20} MB, or tensors that share their first dimension, got "
            f"{_bytes(batch) >> 20} MB and first dimensions {first}. Pass smaller batches as `probe`."
        )
    return pieces
