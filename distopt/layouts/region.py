"""Regions: where a local piece lies in the global tensor, seen as a row-major matrix.

Everything is integers. A tensor of any number of dims is viewed as a matrix by splitting its dims into row dims and
column dims; a hyper-rectangle of the tensor then is one or more rectangles of the matrix, a flat range is at most
three. Rectangles of one rank lie in its local storage at an offset, with a row stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rect:
    """Rows [r0, r1) × columns [c0, c1) of a matrix; element (r0, c0) is at `offset` in the rank's flat local storage,
    one row further is `stride` elements further, one column `step`."""

    r0: int
    r1: int
    c0: int
    c1: int
    offset: int
    stride: int
    step: int = 1

    @property
    def dense(self) -> bool:
        """Whether it lies there row after row, without gaps."""
        return self.step == 1 and self.stride == self.c1 - self.c0

    @property
    def numel(self) -> int:
        """Elements in the rectangle."""
        return (self.r1 - self.r0) * (self.c1 - self.c0)

    def transposed(self) -> Rect:
        """The same elements as a rectangle of the transpose."""
        return Rect(self.c0, self.c1, self.r0, self.r1, self.offset, self.step, self.stride)


def chunk(length: int, parts: int, index: int) -> Interval:
    """The interval that torch.chunk gives part `index` of `parts`: ceil-sized chunks, the last ones short or empty."""
    size = -(-length // parts) if length else 0
    return min(index * size, length), min((index + 1) * size, length)


def box_rects(shape: tuple[int, ...], box: tuple[Interval, ...], row_dims: int) -> list[Rect]:
    """The rectangles of a hyper-rectangle of a tensor, in the matrix view (prod(shape[:row_dims]), prod(rest)).

    The local storage is the hyper-rectangle itself, contiguous.
    """
    rows = _runs(shape[:row_dims], box[:row_dims])
    cols = _runs(shape[row_dims:], box[row_dims:])
    local_cols = sum(stop - start for start, stop in cols)
    rects, local_row = [], 0
    for r0, r1 in rows:
        local_col = 0
        for c0, c1 in cols:
            rects.append(Rect(r0, r1, c0, c1, local_row * local_cols + local_col, local_cols))
            local_col += c1 - c0
        local_row += r1 - r0
    return rects


def flat_rects(cols: int, start: int, stop: int) -> list[Rect]:
    """The at most three rectangles of elements [start, stop) of a row-major matrix with `cols` columns."""
    if start >= stop:
        return []
    rects: list[Rect] = []
    position = start
    while position < stop:
        row, col = divmod(position, cols)
        if col == 0 and stop - position >= cols:
            rows = (stop - position) // cols
            rects.append(Rect(row, row + rows, 0, cols, position - start, cols))
            position += rows * cols
        else:
            end = min(cols, col + stop - position)
            rects.append(Rect(row, row + 1, col, end, position - start, end - col))
            position += end - col
    return rects


def _runs(dims: tuple[int, ...], box: tuple[Interval, ...]) -> list[Interval]:
    """Intervals of the flattened index space of `dims` that the box covers, merged where they touch."""
    runs: list[Interval] = [(0, 1)]
    for size, (start, stop) in zip(dims, box, strict=True):
        if start >= stop:
            return []
        if (start, stop) == (0, size):
            runs = [(a * size, b * size) for a, b in runs]
        else:
            runs = [(i * size + start, i * size + stop) for a, b in runs for i in range(a, b)]
    assert prod(stop - start for start, stop in box) == sum(b - a for a, b in runs)
    return runs
