"""Tiles: the blocks of elements that share a scale where states are stored as codes, and what a group stores how.

Which states are coded, and where tiles begin, follows from the global tensor alone: a tile is BLOCK consecutive
elements of a row, the last one of a row shorter, whatever part of it lies on which rank. So every layout stores the same
codes. A tile that an edge of a shard cuts has its scale agreed on by the ranks that hold it: each knows, from integers,
which tiles of a tensor some rank holds in part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from distopt.layouts.base import Layout
from distopt.matrix.triangle import packed_rows
from distopt.plan.geometry import row_dims_of
from distopt.rule import State

LEAST = 1024
"""Elements of the global tensor from which on states are coded."""
BLOCK = 128
"""Elements that share a scale: fp32 scales then are 1/32 of a byte per element."""
SMALL = 1 << 14
"""Elements below which a parameter is packed with others: a call costs more than the copy."""
CHUNK, GPU_CHUNK = 1 << 16, 1 << 22
"""Elements that a rule's text handles, or that are decoded, at once. On a CPU its temporaries stay in the cache (3.5 times
faster than whole tensors at 30M elements); on a GPU they fill it, and no copy of a large state is ever decoded."""


@dataclass(frozen=True)
class Offload:
    """Where states lie that are not on the device: shares of their bytes by tier ("cpu", "disk:/path"); and whether
    elementwise rules step on the host instead of moving them (`hosted`; None: the cost model says)."""

    shares: tuple[tuple[str, float], ...]
    hosted: bool | None = False


@dataclass
class Storage:
    """How the states of a group are stored: the codec of signed states and of others, by name ("" for the rest; none:
    fp32 all of them), the seed of stochastic rounding, what keeps the rest of fp32 weights beside parameters of lower
    precision; where half of symmetric states is stored, the codec of those that have no other one (`packing`); and where
    states lie: with `offload` in pages, then `exact` is the codec of those that are fp32."""

    codecs: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    seed: int = 0
    master: Any = None
    packing: Any = None
    offload: Offload | None = None
    exact: Any = None

    def codec(self, name: str, state: State, shape: tuple[int, ...]) -> Any:
        """The codec of a state of a parameter of this global shape; None: fp32, on the device. Statistics, which are few,
        stay fp32, and so do copies of the weights, whose rounding would be the weights' own."""
        found = self.codecs.get(name, self.codecs.get(""))
        size = {"like": prod(shape), "owner": prod(state.shape)}
        if size.get(state.kind, 0) < LEAST:
            return None
        if found is None or state.fill == "weight":
            return self.packing if self.packs(state) else self.exact
        return found[0 if state.signed else 1]

    def packs(self, state: State) -> bool:
        """Whether half of this state is stored."""
        return self.packing is not None and state.symmetric and prod(state.shape) >= LEAST

    def extent(self, state: State) -> tuple[int, int]:
        """(rows, cols) that are stored of a state that lives with the owner of a matrix."""
        rows, cols = state.shape
        return (packed_rows(rows) if self.packs(state) else rows, cols)

    def coded(self, states: Mapping[str, State], shape: tuple[int, ...], itemsize: int) -> bool:
        """Whether a parameter of this shape, with elements of so many bytes, has any state that is not fp32."""
        return self.mastered(itemsize) or any(self.codec(name, state, shape) for name, state in states.items())

    def mastered(self, itemsize: int) -> bool:
        """Whether there is a rest of fp32 weights to keep."""
        return self.master is not None and itemsize < 4

    def pack(
        self, layouts: Sequence[Layout], dtypes: Sequence[Any], states: Mapping[str, State]
    ) -> Iterator[list[int]]:
        """Numbers of the parameters with coded states, those together whose codes lie together: small ones of the same
        ranks, dtype and codecs. It goes by global sizes, so that all ranks pack alike."""
        together: dict[object, list[int]] = {}
        for i, layout in enumerate(layouts):
            if self.coded(states, layout.shape, dtypes[i].itemsize):
                codecs = tuple(self.codec(name, state, layout.shape) for name, state in states.items())
                alike = (tuple(sorted(layout.ranks)), dtypes[i], codecs) if prod(layout.shape) < SMALL else i
                together.setdefault(alike, []).append(i)
        yield from together.values()


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of elements that lie in a row, as far as they are here.

    Attributes:
        numel: elements here.
        lengths: of each tile, in the order of storage; None where all are whole.
        cuts: positions of tiles that some rank holds in part.
        slots: of each of those, its place among all such tiles of the tensor.
    """

    numel: int
    lengths: np.ndarray | None
    cuts: np.ndarray
    slots: np.ndarray

    def part(self, tiles: slice, numel: int) -> Tiles:
        """These tiles, which have so many elements, counted from the first of them."""
        first, last = np.searchsorted(self.cuts, (tiles.start, tiles.stop))
        lengths = None if self.lengths is None else self.lengths[tiles]
        return Tiles(numel, lengths, self.cuts[first:last] - tiles.start, self.slots[first:last])

    @property
    def count(self) -> int:
        """Number of tiles here."""
        return self.numel // BLOCK if self.lengths is None else len(self.lengths)

    def spans(self, chunk: int) -> Iterator[tuple[int, int, int, int]]:
        """Runs of tiles of at most `chunk` elements: (first tile, one past the last, first element, one past)."""
        step = max(1, chunk // BLOCK)
        if self.lengths is None:
            edges = [min(tile * BLOCK, self.numel) for tile in range(0, self.count + step, step)]
        else:
            ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
            edges = [int(ends[min(tile, self.count)]) for tile in range(0, self.count + step, step)]
        for number, (start, stop) in enumerate(zip(edges, edges[1:])):
            if stop > start:
                yield number * step, min((number + 1) * step, self.count), start, stop


def coded_bytes(codec: Any, tiles: Tiles, gpu: bool) -> int:
    """Bytes of the codes and scales of one state."""
    codes = sum(codec.code_bytes(stop - start) for _, _, start, stop in tiles.spans(GPU_CHUNK if gpu else CHUNK))
    return codes + (4 * tiles.count if codec.scaled else 0)


@lru_cache(maxsize=65536)
def local_tiles(layout: Layout, index: int) -> Tiles:
    """The tiles of a parameter on rank `index` of its layout, in the order of its local storage."""
    numbers, lengths, _ = _segments(layout, index)
    shared = shared_tiles(layout)
    slots = np.searchsorted(shared, numbers)
    cuts = np.flatnonzero(shared[np.minimum(slots, len(shared) - 1)] == numbers) if len(shared) else np.empty(0, int)
    whole = bool((lengths == BLOCK).all())
    return Tiles(int(lengths.sum()), None if whole else lengths.astype(np.int32), cuts, slots[cuts])


@lru_cache(maxsize=65536)
def shared_tiles(layout: Layout) -> np.ndarray:
    """Numbers of the tiles that some rank of the layout holds in part, ascending; the same on every rank."""
    found = [np.empty(0, np.int64)]
    row_dims, cols, per_row = _view(layout)
    for index in range(len(layout.ranks)):
        for rect in layout.rects(index, row_dims):
            rows = np.arange(rect.r0, rect.r1, dtype=np.int64) * per_row
            if rect.c0 % BLOCK:
                found.append(rows + rect.c0 // BLOCK)
            if rect.c1 % BLOCK and rect.c1 < cols:
                found.append(rows + rect.c1 // BLOCK)
    return np.unique(np.concatenate(found))


def tile_starts(layout: Layout, index: int) -> np.ndarray:
    """Of each local tile the global number of its first element here."""
    return _segments(layout, index)[2]


def join_tiles(parts: list[Tiles], slots: list[int]) -> Tiles:
    """The tiles of several tensors, one after the other; `slots` has the number of each tensor's cut tiles."""
    if len(parts) == 1:
        return parts[0]
    counts = np.cumsum([0] + [part.count for part in parts])
    offsets = np.cumsum([0, *slots])
    lengths = [np.full(p.count, BLOCK, np.int32) if p.lengths is None else p.lengths for p in parts]
    return Tiles(
        sum(part.numel for part in parts),
        None if all(part.lengths is None for part in parts) else np.concatenate(lengths),
        np.concatenate([part.cuts + first for part, first in zip(parts, counts)]),
        np.concatenate([part.slots + first for part, first in zip(parts, offsets)]),
    )


@lru_cache(maxsize=4096)
def whole_tiles(rows: int, cols: int) -> Tiles:
    """The tiles of whole rows, such as those of a matrix that lives with its owner; a single column counts as a row."""
    rows, cols = (1, rows) if cols == 1 else (rows, cols)
    row = [BLOCK] * (cols // BLOCK) + [cols % BLOCK] * (cols % BLOCK > 0)
    lengths = np.tile(np.asarray(row, np.int32), rows) if cols % BLOCK else None
    return Tiles(rows * cols, lengths, np.empty(0, int), np.empty(0, int))


def _view(layout: Layout) -> tuple[int, int, int]:
    """(row dims, elements of a row, tiles of a row) of a tensor."""
    row_dims = row_dims_of(len(layout.shape), flatten=True)
    cols = prod(layout.shape[row_dims:])
    return row_dims, cols, -(-cols // BLOCK)


def _segments(layout: Layout, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each local tile, in the order of storage: its number in the tensor, its length here, its first element."""
    row_dims, cols, per_row = _view(layout)
    parts = [np.empty((4, 0), np.int64)]
    for rect in layout.rects(index, row_dims):
        edges = np.arange(rect.c0 // BLOCK, -(-rect.c1 // BLOCK) + 1, dtype=np.int64)
        starts = np.clip(edges * BLOCK, rect.c0, rect.c1)
        rows = np.arange(rect.r1 - rect.r0, dtype=np.int64)[:, None]
        row = rect.r0 + rows
        found = (
            row * per_row + edges[:-1],
            np.broadcast_to(np.diff(starts), (len(rows), len(edges) - 1)),
            row * cols + starts[:-1],
            rect.offset + rows * rect.stride + starts[:-1] - rect.c0,
        )
        parts.append(np.stack([values.reshape(-1) for values in found]))
    table = np.concatenate(parts, axis=1)
    numbers, lengths, firsts, _ = table[:, np.argsort(table[3], kind="stable")]
    return numbers, lengths, firsts
