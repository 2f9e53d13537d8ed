"""From tensors to logical matrices, and from layouts to the pieces of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from distopt.layouts.base import Layout, matrix_view
from distopt.layouts.region import Rect
from distopt.rule import Shape


@dataclass(frozen=True)
class Logical:
    """How a tensor is made of matrices: its first `row_dims` dims are rows, every `shape.rows` rows are one matrix.

    A vector is one matrix of one row. A 3-D tensor is a stack of matrices (experts). With four dims or more it is one
    matrix (out, rest) for rules that want whole matrices, and a stack of its last two dims for rules that take sums.
    """

    tensor: tuple[int, ...]
    row_dims: int
    shape: Shape

    @property
    def count(self) -> int:
        """Number of logical matrices."""
        rows = matrix_view(self.tensor, self.row_dims)[0]
        return rows // self.shape.rows if self.shape.rows else 0

    def face(self, kind: str) -> tuple[int, ...]:
        """Shape of the whole tensor's state of this kind, dims in the tensor's order, reduced ones of size 1."""
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


def logical_of(tensor: tuple[int, ...], *, flatten: bool) -> Logical:
    """The default reading of a tensor; `flatten` joins the trailing dims of convolutions into columns."""
    ndim = len(tensor)
    if ndim < 2:
        return Logical(tensor, 0, Shape(1, matrix_view(tensor, 0)[1], ndim))
    if ndim > 3 and flatten:
        return Logical(tensor, 1, Shape(*matrix_view(tensor, 1), ndim))
    return Logical(tensor, ndim - 1, Shape(tensor[-2], tensor[-1], ndim))


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

    def _cut(self, index: int) -> Sequence[tuple[int, Rect]]:
        rows, found = self.logical.shape.rows, []
        for rect in self.layout.rects(index, self.logical.row_dims):
            for matrix in range(rect.r0 // rows, -(-rect.r1 // rows)):
                part = rect.cut_rows(matrix * rows, (matrix + 1) * rows)
                if part is not None:
                    found.append((matrix, part))
        return found

    @cached_property
    def _pieces(self) -> dict[int, list[tuple[int, Rect]]]:
        return {}

    @cached_property
    def _by_matrix(self) -> dict[int, dict[int, list[Rect]]]:
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
        numel = self.logical.shape.numel
        return [int(np.argmax(row)) if row.max(initial=0) == numel else None for row in self.counts]

    @cached_property
    def split(self) -> dict[int | None, list[bool]]:
        """For each reduction dim (-1, -2, None: both) and each matrix, whether some piece lacks part of that dim."""
        shape = self.logical.shape
        found: dict[int | None, list[bool]] = {dim: [False] * self.logical.count for dim in (-1, -2, None)}
        for index in range(len(self.layout.ranks)):
            for matrix, rect in self.pieces(index):
                short_rows = rect.c1 - rect.c0 < shape.cols
                short_cols = rect.r1 - rect.r0 < shape.rows
                found[-1][matrix] |= short_rows
                found[-2][matrix] |= short_cols
                found[None][matrix] |= short_rows or short_cols
        return found


@lru_cache(maxsize=65536)
def geometry_of(layout: Layout, logical: Logical) -> Geometry:
    """One Geometry per distinct layout and reading: a model repeats its layers."""
    return Geometry(layout, logical)
