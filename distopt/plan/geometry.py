"""From tensors to logical matrices, and from layouts to the pieces of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import prod

import numpy as np

from distopt.layouts.base import Layout, matrix_view
from distopt.layouts.region import Rect
from distopt.plan.split import Cuts, cut_dim, parse_split
from distopt.rule import Rule, Shape, require

READING = ("split", "block_size", "whole_parts")
"""Options of a group that decide which matrices there are, and so what shapes states have."""


@dataclass(frozen=True, eq=False)
class Logical:
    """How a tensor is made of matrices: every part of its rows × every part of its columns is one. The first
    `row_dims` dims are the rows of what is stored; where that is `transposed`, they are the columns of the matrices.

    A vector is one matrix of one row. A 3-D tensor is a stack of matrices (experts). With four dims or more it is one
    matrix (out, rest) for rules that want whole matrices, and a stack of its last two dims for rules that take sums.
    Anything else is `declared`: by a split, or by a rule that computes in blocks.
    """

    tensor: tuple[int, ...]
    row_dims: int
    shape: Shape
    rows: Cuts
    cols: Cuts
    declared: bool = False
    transposed: bool = False
    named: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of logical matrices."""
        return len(self.rows.sizes) * len(self.cols.sizes)

    @cached_property
    def shapes(self) -> list[Shape]:
        """The shape of each matrix; the part's name is in it if the rule wants to know."""
        found = []
        for rows, row_name in zip(self.rows.sizes, self.rows.names):
            for cols, col_name in zip(self.cols.sizes, self.cols.names):
                name = row_name or col_name
                found.append(Shape(rows, cols, self.shape.ndim, name if name in self.named else ""))
        return found

    @cached_property
    def weights(self) -> list[int]:
        """For each matrix, which of the weights that the tensor is made of it belongs to: what `scope="tensor"` means."""
        across = max(self.cols.weights, default=0) + 1
        return [row * across + col for row in self.rows.weights for col in self.cols.weights]

    @cached_property
    def kinds(self) -> list[Shape]:
        """The shapes that occur."""
        return list(dict.fromkeys(self.shapes)) or [self.shape]

    def starts(self, kind: str) -> list[int]:
        """Where each matrix's state of this kind ("row", "col", "matrix") begins, matrix after matrix, and where the last
        one ends."""
        if kind not in self._starts:
            lengths = ({"row": shape.rows, "col": shape.cols, "matrix": 1}[kind] for shape in self.shapes)
            self._starts[kind] = list(accumulate(lengths, initial=0))
        return self._starts[kind]

    @cached_property
    def _starts(self) -> dict[str, list[int]]:
        return {}

    def face(self, kind: str) -> tuple[int, ...]:
        """Shape of the whole tensor's state of this kind, dims in the tensor's order, reduced ones of size 1; for a
        statistic of declared matrices all of it, matrix after matrix."""
        if self.declared and kind in ("row", "col", "matrix"):
            return (self.starts(kind)[-1],)
        lead = len(self.tensor) - self._matrix_dims
        if kind == "row":
            return self.tensor[: self.row_dims] + (1,) * (len(self.tensor) - self.row_dims)
        if kind == "col":
            return self.tensor[:lead] + (1,) * (self.row_dims - lead) + self.tensor[self.row_dims :]
        if kind == "matrix":
            return self.tensor[:lead] + (1,) * self._matrix_dims
        return self.tensor

    @property
    def _matrix_dims(self) -> int:
        """Trailing dims that one matrix spans."""
        return len(self.tensor) if self.count == 1 and self.row_dims <= 1 else 2


def row_dims_of(ndim: int, *, flatten: bool) -> int:
    """How many of a tensor's first dims are rows; `flatten` joins the trailing dims of convolutions into columns."""
    return 1 if ndim > 3 and flatten else max(ndim - 1, 0)


def logical_of(tensor: tuple[int, ...], rule: Rule, split: str | None = None) -> Logical:
    """How a rule reads a tensor of this shape.

    Args:
        tensor: the whole tensor's shape.
        rule: one that wants whole matrices joins the trailing dims of convolutions into columns; one with a
            `block_size` cuts every matrix into blocks.
        split: which matrices the tensor is made of (`distopt.plan.split`).

    Raises:
        ValueError: the split is not one, or does not fit the shape.
    """
    require(split is None or isinstance(split, str), f"split is text, as in 'q:32h,k:8h,v:8h', got {split!r}")
    block = getattr(rule, "block_size", None) if len(tensor) > 1 else None
    return _logical_of(tensor, rule.reach == "matrix", split, block, getattr(rule, "whole_parts", ()))


@lru_cache(maxsize=65536)
def _logical_of(
    tensor: tuple[int, ...], flatten: bool, text: str | None, block: int | None, named: tuple[str, ...]
) -> Logical:
    split, ndim = parse_split(text) if text else None, len(tensor)
    require(split is None or ndim > 1, f"split={text!r} needs a matrix, got shape {tensor}")
    row_dims = 1 if split and split.flattened else row_dims_of(ndim, flatten=flatten)
    stacked = row_dims > 1 or ndim == 2
    copies = prod(tensor[:-2]) if stacked else 1
    rows, cols = (tensor[-2], tensor[-1]) if stacked else matrix_view(tensor, row_dims)
    across, transposed = bool(split and split.cols), bool(split and split.transposed)
    # Only the stored rows come in copies, one per entry of the leading dims.
    if transposed:
        row_cuts = cut_dim(cols, 1, None if across else split, block)
        col_cuts = cut_dim(rows, copies, split if across else None, block)
        shape = Shape(cols, rows, ndim)
    else:
        row_cuts = cut_dim(rows, copies, None if across else split, block)
        col_cuts = cut_dim(cols, 1, split if across else None, block)
        shape = Shape(rows, cols, ndim)
    alone = block is not None and max(rows, cols) <= block
    declared = split is not None or (block is not None and not alone)
    return Logical(tensor, row_dims, shape, row_cuts, col_cuts, declared, transposed, named)


@dataclass(frozen=True)
class Geometry:
    """The pieces of one tensor's logical matrices on every rank of its layout. Shared by all parameters of the same
    shape and layout, since a model repeats its layers."""

    layout: Layout
    logical: Logical

    def pieces_of(self, index: int, matrix: int) -> list[Rect]:
        """The rectangles of one matrix on rank `index` of the layout."""
        if index not in self._by_matrix:
            self._by_matrix[index] = {}
            for number, rect in self.pieces(index):
                self._by_matrix[index].setdefault(number, []).append(rect)
        return self._by_matrix[index].get(matrix, [])

    def pieces(self, index: int) -> list[tuple[int, Rect]]:
        """(matrix, rectangle in that matrix) for everything that rank `index` of the layout holds."""
        cached = self._pieces
        if index not in cached:
            cached[index] = list(self._cut(index))
        return cached[index]

    def _cut(self, index: int) -> Iterator[tuple[int, Rect]]:
        logical = self.logical
        across = len(logical.cols.sizes)
        for stored in self.layout.rects(index, logical.row_dims):
            rect = stored.transposed() if logical.transposed else stored
            for row in logical.rows.overlaps(rect.r0, rect.r1):
                for col in logical.cols.overlaps(rect.c0, rect.c1):
                    offset = rect.offset + (row.start - rect.r0) * rect.stride + (col.start - rect.c0) * rect.step
                    r1, c1 = row.at + row.stop - row.start, col.at + col.stop - col.start
                    found = Rect(row.at, r1, col.at, c1, offset, rect.stride, rect.step)
                    yield row.part * across + col.part, found

    @cached_property
    def _pieces(self) -> dict[int, list[tuple[int, Rect]]]:
        return {}

    @cached_property
    def _by_matrix(self) -> dict[int, dict[int, list[Rect]]]:
        return {}

    def places(self, index: int) -> dict[int, int]:
        """The pieces of rank `index`, by offset, numbered in the order in which they lie."""
        if index not in self._places:
            offsets = sorted(rect.offset for _, rect in self.pieces(index))
            self._places[index] = {offset: place for place, offset in enumerate(offsets)}
        return self._places[index]

    @cached_property
    def _places(self) -> dict[int, dict[int, int]]:
        return {}

    @cached_property
    def counts(self) -> np.ndarray:
        """Elements of each matrix on each rank, (matrices, ranks)."""
        counts = np.zeros((self.logical.count, len(self.layout.ranks)), dtype=np.int64)
        for index in range(len(self.layout.ranks)):
            for matrix, rect in self.pieces(index):
                counts[matrix, index] += rect.numel
        return counts

    @cached_property
    def whole_at(self) -> list[int | None]:
        """For each matrix the rank index that holds all of it, or None."""
        numels = [shape.numel for shape in self.logical.shapes]
        return [int(np.argmax(row)) if row.max(initial=0) == numel else None for row, numel in zip(self.counts, numels)]

    def scattered(self, matrix: int) -> bool:
        """Whether a matrix that lies on one rank lies there in several pieces, which have to be put together."""
        index = self.whole_at[matrix]
        return index is not None and len(self.pieces_of(index, matrix)) > 1

    @cached_property
    def split(self) -> dict[int | None, list[bool]]:
        """For each reduction dim (-1, -2, None: both) and each matrix, whether some piece lacks part of that dim."""
        shapes = self.logical.shapes
        found: dict[int | None, list[bool]] = {dim: [False] * self.logical.count for dim in (-1, -2, None)}
        for index in range(len(self.layout.ranks)):
            for matrix, rect in self.pieces(index):
                short_rows = rect.c1 - rect.c0 < shapes[matrix].cols
                short_cols = rect.r1 - rect.r0 < shapes[matrix].rows
                found[-1][matrix] |= short_rows
                found[-2][matrix] |= short_cols
                found[None][matrix] |= short_rows or short_cols
        return found

    def statistics(self, index: int, kind: str) -> Iterator[tuple[int, int, int, int, bool]]:
        """What rank `index` has of a statistic ("row", "col", "matrix"), run by run: the matrix, [start, stop) of its
        rows, its columns or its one number, where the run begins in the rank's flat state, and whether no earlier rank
        and no earlier piece has it too."""
        at = 0
        for matrix, rect in sorted(self.pieces(index), key=lambda piece: piece[1].offset):
            start, stop = _extent(kind, rect)
            taken = np.zeros(stop - start, dtype=bool)
            earlier = [other for rank in range(index) for other in self.pieces_of(rank, matrix)]
            earlier += [other for other in self.pieces_of(index, matrix) if other.offset < rect.offset]
            for other in earlier:
                a, b = _extent(kind, other)
                taken[max(a - start, 0) : max(b - start, 0)] = True
            edges = [0, *(np.flatnonzero(np.diff(taken)) + 1).tolist(), stop - start]
            for a, b in zip(edges, edges[1:]):
                yield matrix, start + a, start + b, at + a, not taken[a]
            at += stop - start


def _extent(kind: str, rect: Rect) -> tuple[int, int]:
    """The interval of a statistic that a rectangle has: of its rows, its columns, or the matrix's one number."""
    return {"row": (rect.r0, rect.r1), "col": (rect.c0, rect.c1), "matrix": (0, 1)}[kind]


@lru_cache(maxsize=65536)
def geometry_of(layout: Layout, logical: Logical) -> Geometry:
    """One Geometry per distinct layout and reading: a model repeats its layers."""
    return Geometry(layout, logical)
