"""How the parameters move from step to step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Fits a processor's cache: the passes over a chunk cost little beside its copy. Large nets are cut into so many parts,
# which takes no longer there, and as many operators whatever their size; each of those has a price of its own.
_CHUNK = 1 << 17
_CHUNKS = 128
_SAMPLED = 256  # of each chunk in the random projection


class Movement(NamedTuple):
    """One update Δθ in three numbers.

    Attributes:
        relative_update: ‖Δθ‖ / ‖θ‖.
        projection: ⟨w, Δθ⟩ for the vector that is projected on; None without one.
        random_projection: ⟨z, Δθ⟩ for a fixed random z.
    """

    relative_update: float
    projection: float | None
    random_projection: float


class UpdateProjector:
    """Each update in numbers, at the price of one copy of the parameters and six passes over them.

    The parameters are cut into parts of 2¹⁷ coordinates, or some 128 larger ones, ten operators each. z has up to 256
    Gaussian entries in each part and is zero elsewhere: it is there to notice a rhythm, which a direction through all
    parts does.

    Args:
        params: Parameters, in the order of all vectors.
        seed: Seed of z.
    """

    def __init__(self, params: Sequence[Tensor], seed: int = 0) -> None:
        self._params = list(params)
        self._seed = seed
        self._w: Tensor | None = None
        self._chunks: list[_Chunk] = []
        self._places: list[int] = []  # addresses of the parameters that the chunks are views of
        self._begun = False  # whether the place before the present update is known
        self._view()

    def project_on(self, w: Tensor | None) -> None:
        """Project on ``w``, ``(n,)``, from now on."""
        self._w = w
        sizes = [chunk.size for chunk in self._chunks]
        parts: Sequence[Tensor | None] = [None] * len(sizes) if w is None else torch.split(w.detach(), sizes)
        for chunk, part in zip(self._chunks, parts, strict=True):
            chunk.w = None if part is None else part.to(chunk.device)

    def before(self) -> None:
        """Copy the parameters, before an update."""
        if self._places != _addresses(self._params):  # `.data` was set: the views are of what it was
            self._view()
            self.project_on(self._w)
        for chunk in self._chunks:
            chunk.copy()
        self._begun = True

    def after(self) -> Tensor | None:
        """Return ``(‖Δθ‖², ‖θ‖², ⟨w, Δθ⟩ or NaN, ⟨z, Δθ⟩)`` on the parameters' device, after the update.

        On the device, because reading a number from an accelerator waits for it; :func:`movement` reads them. None if
        they were not copied before.
        """
        begun = self._begun
        self._begun = False
        if not begun or self._places != _addresses(self._params):
            return None
        # A net may be spread over several devices.
        device = self._params[0].device
        values = torch.stack([value.to(device) for chunk in self._chunks for value in chunk.compare()]).double()
        return values if len(self._chunks) == 1 else values.view(-1, 4).sum(0)

    def _view(self) -> None:
        generator = torch.Generator().manual_seed(self._seed)
        self._chunks = [_Chunk(views, generator) for views in _chunked(self._params)]
        self._places = _addresses(self._params)


def _addresses(params: Sequence[Tensor]) -> list[int]:
    return [p.data_ptr() for p in params]


class _Chunk:
    """Some parameters side by side, so that few operations serve many small ones."""

    def __init__(self, views: list[Tensor], generator: torch.Generator) -> None:
        self._views = views
        self._flat = all(view.dim() == 1 for view in views)
        self.size = sum(view.numel() for view in views)
        self.w: Tensor | None = None
        self.device = views[0].device
        self._dtype = torch.promote_types(views[0].dtype, torch.float32)
        count = min(self.size, _SAMPLED)
        # Drawn twice an entry counts twice; a permutation of a large part takes longer than all the rest.
        if self.size <= _CHUNK:
            picked = torch.randperm(self.size, generator=generator, device="cpu")[:count]
        else:
            picked = torch.randint(self.size, (count,), generator=generator, device="cpu")
        self._picked = picked.to(self.device)
        self._z = torch.randn(count, generator=generator, device="cpu").to(self.device, self._dtype)
        self._unknown = self._z.new_tensor(torch.nan)
        self._before: Tensor | None = None

    def copy(self) -> None:
        """Keep the present values."""
        if self._before is None:
            self._before = torch.empty(self.size, dtype=self._views[0].dtype, device=self._views[0].device)
        torch.cat(self._pieces(), out=self._before)

    def compare(self) -> tuple[Tensor, ...]:
        """Return ``(‖Δθ‖², ‖θ‖², ⟨w, Δθ⟩ or NaN, ⟨z, Δθ⟩)`` since the copy, which it uses up."""
        assert self._before is not None
        pieces = self._pieces()
        now = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if now.dtype == self._dtype:
            update = torch.sub(now, self._before, out=self._before)
        else:
            now = now.to(self._dtype)
            update = now - self._before
        # Not torch.dot: where the two start at different places of 16 bytes, MKL's takes eight times as long.
        along = self._unknown if self.w is None else torch.mv(update[None], self.w.to(self._dtype))[0]
        at_random = torch.dot(update.index_select(0, self._picked), self._z)
        return torch.dot(update, update), torch.dot(now, now), along, at_random

    def _pieces(self) -> list[Tensor]:
        return self._views if self._flat else [view.reshape(-1) for view in self._views]


def _chunked(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut parameters into pieces and join small ones, in order, to at most ``_CHUNK`` or a 128th of all coordinates."""
    most = max(_CHUNK, sum(p.numel() for p in params) // _CHUNKS)
    chunk: list[Tensor] = []
    for p in params:
        whole = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
        # A flat view of other memory layouts would be a copy.
        for piece in torch.split(whole.view(-1), most) if whole.is_contiguous() else (whole,):
            kind = (piece.dtype, piece.device)
            room = most - sum(other.numel() for other in chunk)
            if chunk and (piece.numel() > room or kind != (chunk[0].dtype, chunk[0].device)):
                yield chunk
                chunk = []
            chunk.append(piece)
    if chunk:
        yield chunk


def movement(values: Sequence[float]) -> Movement:
    """Return the numbers of :meth:`UpdateProjector.after`, read from the device, as what they mean."""
    update2, size2, along, at_random = values
    relative = math.sqrt(update2 / size2) if size2 > 0.0 else math.sqrt(update2)
    return Movement(relative, None if math.isnan(along) else along, at_random)
