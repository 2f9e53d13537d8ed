"""A state stored as codes: flat runs of tiles, decoded and encoded a span at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.groups import Domain
from distopt.kernels import state_kernels
from distopt.matrix.triangle import pack, unpack
from distopt.plan.tiles import BLOCK, CHUNK, GPU_CHUNK, Tiles
from distopt.state import transcode
from distopt.state.allocation import allocate
from distopt.state.codecs.base import FLOOR, Codec
from distopt.state.commit import put
from distopt.state.noise import Key


@dataclass(frozen=True)
class Span:
    """A run of whole tiles: where its tiles, its elements and its stored codes lie."""

    tiles: slice
    elements: slice
    stored: slice


@dataclass(frozen=True)
class Agreed:
    """Tiles that an edge of a shard cuts: their positions here, ascending, and their maxima over all ranks."""

    cuts: np.ndarray
    maxima: Tensor

    def put(self, maxima: Tensor, tiles: slice) -> None:
        """Give the cut ones among the maxima of these tiles the values that hold everywhere."""
        first, last = np.searchsorted(self.cuts, (tiles.start, tiles.stop))
        if first < last:
            at = torch.from_numpy(self.cuts[first:last] - tiles.start).to(maxima.device)
            maxima[at] = self.maxima[first:last]

    def to(self, device: torch.device) -> Agreed:
        """The same there."""
        return Agreed(self.cuts, self.maxima.to(device))

    def part(self, tiles: slice) -> Agreed:
        """Those among these tiles, counted from the first of them."""
        first, last = np.searchsorted(self.cuts, (tiles.start, tiles.stop))
        return Agreed(self.cuts[first:last] - tiles.start, self.maxima[first:last])


class Coded:
    """See the module. `starts` has the number of each tile's first element in the group, where rounding is stochastic;
    `shape` is that of `matrix()`. With `lies` False it has no bytes until they are given it (`lie_in`)."""

    def __init__(
        self,
        codec: Codec,
        tiles: Tiles,
        device: torch.device,
        fill: float = 0.0,
        starts: np.ndarray | None = None,
        shape: tuple[int, ...] = (-1,),
        *,
        lies: bool = True,
    ) -> None:
        self.codec, self.tiles, self.shape, self.device, self.fill = codec, tiles, shape, device, fill
        self.spans: list[Span] = []
        items = 0
        for t0, t1, e0, e1 in tiles.spans(CHUNK if device.type == "cpu" else GPU_CHUNK):
            count = codec.code_bytes(e1 - e0) // codec.dtype.itemsize
            self.spans.append(Span(slice(t0, t1), slice(e0, e1), slice(items, items + count)))
            items += count
        self.sizes = items, tiles.count if codec.scaled else 0
        self.stored = allocate(items if lies else 0, codec.dtype, device)
        self.scales = torch.empty(self.sizes[1] if lies else 0, device=device)
        self._lengths = None if tiles.lengths is None else torch.from_numpy(tiles.lengths).to(device)
        self._starts = torch.from_numpy(starts).to(device) if starts is not None and codec.stochastic else None
        if lies:
            self.clear()

    @property
    def firsts(self) -> Tensor | None:
        """The number of each tile's first element in the group, where rounding is stochastic."""
        return self._starts

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.sizes[0] * self.codec.dtype.itemsize + 4 * self.sizes[1]

    def clear(self) -> None:
        """Store what the state starts as."""
        self.stored.zero_()
        self.scales.fill_(FLOOR)
        if self.fill:
            self.write(torch.full((self.tiles.numel,), self.fill, device=self.device), None, Key(0, 0, ""))

    def lie_in(self, page: Tensor, codes: int, scales: int) -> None:
        """Take these places in bytes (uint8) as those of codes and scales."""
        dtype = self.codec.dtype
        self.stored = page[codes : codes + self.sizes[0] * dtype.itemsize].view(dtype)
        self.scales = page[scales : scales + 4 * self.sizes[1]].view(torch.float32)

    def decode(self, span: Span) -> Tensor:
        """The values of a span in fp32, flat."""
        kernels = state_kernels(self.device)
        if kernels is not None:
            return transcode.decode(kernels, [(self, [span])])[0]
        codes = self.codec.unpack(self.stored[span.stored], span.elements.stop - span.elements.start)
        if not self.codec.scaled:
            return self.codec.decode(codes, codes)
        if self._lengths is None:
            rows = codes.view(-1, BLOCK)
            return self.codec.decode(rows, self.scales[span.tiles, None]).view(-1)
        return self.codec.decode(codes, self._spread(span, self.scales))

    def encode(self, span: Span, values: Tensor, agreed: Agreed | None, key: Key, ok: Tensor | None = None) -> None:
        """Store the values of a span (fp32, flat); see `put` for `ok`."""
        kernels = state_kernels(self.device)
        if kernels is not None:
            transcode.encode(kernels, [(self, [span], values, agreed, key)], ok)
            return
        noise = self._noise(span, key)
        if not self.codec.scaled:
            put(self.stored[span.stored], self.codec.encode(values, values, noise), ok)
            return
        maxima = self.maxima(span, values)
        if agreed is not None:
            agreed.put(maxima, span.tiles)
        put(self.scales[span.tiles], maxima.clamp_(min=FLOOR), ok)
        if self._lengths is None:
            codes = self.codec.encode(values.view(-1, BLOCK), self.scales[span.tiles, None], noise)
        else:
            codes = self.codec.encode(values, self._spread(span, self.scales), noise)
        put(self.stored[span.stored], self.codec.pack(codes.view(-1)), ok)

    def maxima(self, span: Span, values: Tensor) -> Tensor:
        """The largest magnitude in each tile of a span."""
        if self._lengths is None:
            return values.view(-1, BLOCK).abs().amax(1)
        # What is safe is looked at on the host, which waits for the device.
        return torch.segment_reduce(values.abs(), "max", lengths=self._lengths[span.tiles].long(), unsafe=True)

    def read(self) -> Tensor:
        """All values in fp32, flat."""
        return self._read(self.spans)

    def run(self, part: slice) -> Tensor:
        """The values of a run of elements in fp32, flat."""
        spans = [s for s in self.spans if s.elements.start < part.stop and s.elements.stop > part.start]
        first = spans[0].elements.start if spans else part.start
        return self._read(spans)[part.start - first : part.stop - first]

    def matrix(self) -> Tensor:
        """All values in fp32, in their shape."""
        return self.read().view(self.shape)

    def write(self, values: Tensor, agreed: Agreed | None, key: Key, ok: Tensor | None = None) -> None:
        """Store all values (fp32, flat); see `put` for `ok`."""
        kernels = state_kernels(self.device)
        if kernels is not None:
            transcode.encode(kernels, [(self, self.spans, values, agreed, key)], ok)
            return
        for span in self.spans:
            self.encode(span, values[span.elements], agreed, key, ok)

    def is_cut(self, span: Span) -> bool:
        """Whether an edge of a shard cuts one of these tiles."""
        first, last = np.searchsorted(self.tiles.cuts, (span.tiles.start, span.tiles.stop))
        return bool(first < last)

    def note_cuts(self, span: Span, values: Tensor, found: Tensor) -> None:
        """Put the maxima of the cut tiles of a span into `found`, which is in the order of `tiles.cuts`."""
        first, last = np.searchsorted(self.tiles.cuts, (span.tiles.start, span.tiles.stop))
        at = torch.from_numpy(self.tiles.cuts[first:last] - span.tiles.start).to(values.device)
        found[first:last] = self.maxima(span, values)[at]

    def cut_maxima(self, values: Tensor | None) -> Tensor:
        """The maxima of the cut tiles in these values (flat, all), in the order of `tiles.cuts`; zeros without values."""
        found, kernels = torch.zeros(len(self.tiles.cuts), device=self.device), state_kernels(self.device)
        if values is not None and kernels is not None and len(found):
            maxima = transcode.maxima(kernels, self, [span for span in self.spans if self.is_cut(span)], values)
            return maxima[torch.from_numpy(self.tiles.cuts).to(self.device)]
        if values is not None:
            for span in self.spans:
                if self.is_cut(span):
                    self.note_cuts(span, values[span.elements], found)
        return found

    def _read(self, spans: list[Span]) -> Tensor:
        """The values of a run of spans."""
        kernels = state_kernels(self.device)
        if kernels is not None:
            return transcode.decode(kernels, [(self, spans)])[0]
        parts = [self.decode(span) for span in spans]
        return torch.cat(parts) if parts else torch.empty(0, device=self.device)

    def _spread(self, span: Span, per_tile: Tensor) -> Tensor:
        """One value per tile to one per element."""
        assert self._lengths is not None
        numel = span.elements.stop - span.elements.start
        return per_tile[span.tiles].repeat_interleave(self._lengths[span.tiles], output_size=numel)

    def _noise(self, span: Span, key: Key) -> Tensor:
        if self._starts is None:
            return self.stored
        starts = self._starts[span.tiles]
        if self._lengths is None:
            return key.bits((starts[:, None] + torch.arange(BLOCK, device=starts.device)).view(-1))
        lengths = self._lengths[span.tiles].long()
        numel = span.elements.stop - span.elements.start
        shifted = starts - lengths.cumsum(0) + lengths
        elements = shifted.repeat_interleave(lengths, output_size=numel)
        return key.bits(elements + torch.arange(numel, device=starts.device))


class Packed(Coded):
    """A symmetric matrix, of which half is stored; `shape` is that of the whole."""

    def read(self) -> Tensor:
        half = super().read()
        return unpack(half.view(1, -1, self.shape[-1])).view(-1)

    def write(self, values: Tensor, agreed: Agreed | None, key: Key, ok: Tensor | None = None) -> None:
        super().write(pack(values.view(1, *self.shape)).view(-1), agreed, key, ok)


def read_all(stores: Sequence[Any]) -> list[Tensor]:
    """All values of each of these stores, in pages or not, in fp32, flat; by one launch per codec where kernels read them."""
    kernels = state_kernels(stores[0].device) if stores else None
    if kernels is None or any(type(store) is not Coded for store in stores):
        return [store.read() for store in stores]
    return transcode.decode(kernels, [(store, store.spans) for store in stores])


def write_all(given: Sequence[tuple[Any, Tensor, Agreed | None, Key]], ok: Tensor | None = None) -> None:
    """Store all values (fp32, flat) of each of these stores, in pages or not; see `read_all`, and `put` for `ok`."""
    kernels = state_kernels(given[0][0].device) if given else None
    if kernels is None or any(type(store) is not Coded for store, *_ in given):
        for store, values, agreed, key in given:
            store.write(values, agreed, key, ok)
        return
    transcode.encode(kernels, [(store, store.spans, *rest) for store, *rest in given], ok)


def agree(
    domain: Domain, found: Sequence[tuple[Any, int, Tensor]], device: torch.device
) -> Generator[dist.Work | None, None, list[Agreed | None]]:
    """Maxima of cut tiles over all ranks, by one reduction, which is yielded to be waited for; None for codecs without scales.
    `found` has, of each state (its store, in pages or not), the number of slots of its tensor, the same on every rank, and
    the maxima here."""
    flat = torch.zeros(sum(slots for _, slots, _ in found), device=device)
    parts = list(flat.split([slots for _, slots, _ in found])) if found else []
    answers: list[Agreed | None] = []
    places = [torch.from_numpy(coded.tiles.slots).to(device) for coded, _, _ in found]
    for (_, slots, maxima), part, at in zip(found, parts, places):
        if slots:
            part.scatter_reduce_(0, at, maxima, "amax")
    yield domain.all_reduce(flat, "max")
    for (coded, slots, _), part, at in zip(found, parts, places):
        answers.append(Agreed(coded.tiles.cuts, part[at]) if slots else None)
    return answers
