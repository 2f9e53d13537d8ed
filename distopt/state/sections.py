"""Sections: runs of a unit's elements whose codes lie together, all of them or those of a page; and stores in pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distopt.matrix.triangle import pack, unpack
from distopt.plan.hosting import STEPPED
from distopt.plan.pages import Page
from distopt.plan.tiles import CHUNK, GPU_CHUNK, Tiles
from distopt.state.coded import Agreed, Coded, Span
from distopt.state.noise import Key
from distopt.state.pages.pager import Pager

MASTER = "master"
"""What state dicts call fp32 weights beside parameters of lower precision."""


HOST = torch.device("cpu")


@dataclass
class Section:
    """See the module. What has a page has bytes only while it is open.

    Attributes:
        elements, tiles: which of the unit's; `shape` the tiles themselves.
        cuts: which of the tiles that an edge of a shard cuts.
        stores: the codes and scales of these elements, by state name.
        rest: what parameters of lower precision lack of fp32 weights; or None.
        device: where it is stepped.
        kept: how that is stored, in a page.
        rows: what a kernel is told of all this, if it has no page (`state/fused.py`).
    """

    elements: slice
    tiles: slice
    cuts: slice
    shape: Tiles
    stores: dict[str, Coded] = field(default_factory=dict)
    rest: Tensor | None = None
    device: torch.device = HOST
    kept: Coded | None = None
    page: Page | None = None
    pager: Pager | None = None
    rows: np.ndarray | None = None

    @property
    def hosted(self) -> bool:
        """Whether it is stepped on the host, wherever the parameters lie."""
        return self.page is not None and self.page.tier == STEPPED

    @property
    def is_cut(self) -> bool:
        """Whether an edge of a shard cuts any of its tiles."""
        return self.cuts.start < self.cuts.stop

    def within(self, span: slice) -> slice:
        """A span of the unit's elements, counted from the first one here, as far as it is here."""
        first, last = self.elements.start, self.elements.stop
        return slice(max(span.start, first) - first, min(span.stop, last) - first)

    def meets(self, span: slice) -> bool:
        """Whether any of these elements is here."""
        return span.start < self.elements.stop and span.stop > self.elements.start

    def spans(self) -> Iterator[tuple[slice, dict[str, Span]]]:
        """Runs of the unit's elements, with the span of each store."""
        chunk, first = CHUNK if self.device.type == "cpu" else GPU_CHUNK, self.elements.start
        for number, (_, _, start, stop) in enumerate(self.shape.spans(chunk)):
            yield slice(first + start, first + stop), {n: store.spans[number] for n, store in self.stores.items()}

    @contextmanager
    def opened(self, *, write: bool, fresh: bool = False) -> Iterator[Section]:
        """Have the bytes here. With `write` they are kept; `fresh` ones, all of which are to be written, are not read."""
        if self.page is None or self.pager is None:
            yield self
            return
        with self.pager.opened(self.page, write=write, fresh=fresh) as page:
            for name, store in self.stores.items():
                store.lie_in(page, *self.page.places[name])
            if self.kept is not None:
                self.kept.lie_in(page, *self.page.places[MASTER])
                self.rest = self.kept.stored
            yield self
            nothing = page[:0]
            for store in self.stores.values():
                store.lie_in(nothing, 0, 0)
            self.rest = None if self.kept is None else nothing


def whole(tiles: Tiles, stores: dict[str, Coded], rest: Tensor | None, device: torch.device) -> Section:
    """All of a unit."""
    ranges = slice(0, tiles.numel), slice(0, tiles.count), slice(0, len(tiles.cuts))
    return Section(*ranges, tiles, stores, rest, device)


def paged_sections(
    pager: Pager,
    pages: list[Page],
    codecs: Mapping[str, Any],
    fills: Mapping[str, float],
    tiles: Tiles,
    device: torch.device,
    starts: np.ndarray | None,
) -> list[Section]:
    """A section per page, of stores with these codecs, that of "master" holding the rest of fp32 weights; as they start,
    the rest zero."""
    sections = []
    for page in pages:
        cuts = slice(*np.searchsorted(tiles.cuts, (page.tiles.start, page.tiles.stop)).tolist())
        part = tiles.part(page.tiles, page.elements.stop - page.elements.start)
        first = None if starts is None else starts[page.tiles]
        stores = {n: Coded(c, part, device, fills.get(n, 0.0), first, lies=False) for n, c in codecs.items()}
        kept = stores.pop(MASTER, None)
        section = Section(page.elements, page.tiles, cuts, part, stores, None, device, kept, page, pager)
        with section.opened(write=True, fresh=True):
            for store in (*stores.values(), *([kept] if kept else [])):
                store.clear()
        sections.append(section)
    return sections


class Paged:
    """A store whose bytes lie in pages; of several stores in the same ones, that of `name`. Like `Coded` as a whole, and
    like a flat tensor where it is the rest of fp32 weights; on `device`, wherever its sections are."""

    def __init__(
        self,
        name: str,
        sections: list[Section],
        codec: Any,
        tiles: Tiles,
        device: torch.device,
        shape: tuple[int, ...] = (-1,),
    ) -> None:
        self.name, self.sections, self.codec, self.tiles, self.device = name, sections, codec, tiles, device
        self.shape = shape
        self.alone = all(len(section.stores) + (section.kept is not None) == 1 for section in sections)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        stores = [section.kept if self.name == MASTER else section.stores[self.name] for section in self.sections]
        return sum(store.nbytes for store in stores if store is not None)

    def pages(self) -> list[Page]:
        """In order."""
        return [section.page for section in self.sections if section.page is not None]

    def read(self) -> Tensor:
        """All values in fp32, flat."""
        return self.run(slice(0, self.tiles.numel))

    def run(self, part: slice) -> Tensor:
        """The values of a run of elements in fp32, flat."""
        found = []
        for section in self._meeting(part):
            with section.opened(write=False):
                found.append(section.stores[self.name].run(section.within(part)))
        return torch.cat(found).to(self.device) if found else torch.empty(0, device=self.device)

    def matrix(self) -> Tensor:
        """All values in fp32, in their shape."""
        return self.read().view(self.shape)

    def write(self, values: Tensor, agreed: Agreed | None, key: Key, ok: Tensor | None = None) -> None:
        """Store all values (fp32, flat). No `ok` is asked on the device: what is to stay would have to be fetched."""
        assert ok is None
        for section in self.sections:
            known = None if agreed is None else agreed.part(section.tiles).to(section.device)
            with section.opened(write=True, fresh=self.alone):
                section.stores[self.name].write(values[section.elements].to(section.device), known, key)

    def cut_maxima(self, values: Tensor | None) -> Tensor:
        """As of `Coded`."""
        found = torch.zeros(len(self.tiles.cuts), device=self.device)
        for section in self.sections if values is not None else ():
            if section.is_cut:
                assert values is not None
                here = values[section.elements].to(section.device)
                found[section.cuts] = section.stores[self.name].cut_maxima(here).to(self.device)
        return found

    def __getitem__(self, part: slice) -> Tensor:
        found = []
        for section in self._meeting(part):
            with section.opened(write=False):
                assert section.rest is not None
                found.append(section.rest[section.within(part)].clone())
        return torch.cat(found).to(self.device) if found else torch.empty(0, dtype=self.codec.dtype, device=self.device)

    def __setitem__(self, part: slice, value: Tensor) -> None:
        for section in self._meeting(part):
            here = section.within(part)
            first = section.elements.start + here.start - part.start
            with section.opened(write=True):
                assert section.rest is not None
                section.rest[here] = value[first : first + here.stop - here.start]

    def _meeting(self, part: slice) -> Iterator[Section]:
        return (section for section in self.sections if section.meets(part))


class PagedPacked(Paged):
    """A symmetric matrix, of which half is stored; `shape` is that of the whole."""

    def read(self) -> Tensor:
        return unpack(super().read().view(1, -1, self.shape[-1])).view(-1)

    def write(self, values: Tensor, agreed: Agreed | None, key: Key, ok: Tensor | None = None) -> None:
        super().write(pack(values.view(1, *self.shape)).view(-1), agreed, key, ok)
