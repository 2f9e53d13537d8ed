"""What the reductions of a bucket need in a buffer that all ranks lay out alike."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from distopt.plan.buckets import Entry
from distopt.plan.trace import Ask
from distopt.rule import Shape


@dataclass(frozen=True)
class Field:
    """Runs of `length` elements in a round's buffer, one per split entry of a logical shape, or one per weight; `rows` maps
    entries."""

    length: int
    rows: dict[int, int]
    count: int

    @property
    def numel(self) -> int:
        """Elements of the buffer."""
        return self.length * self.count


def fields_of(entries: tuple[Entry, ...], ask: Ask) -> dict[Shape | None, Field]:
    """What one request needs in the round's buffer, by logical shape; the layout is the same on every rank. Entries that
    no rank lacks part of are answered where they lie."""
    if ask.scope == "tensor":
        weights = {weight: row for row, weight in enumerate(sorted({entry.weight for entry in entries}))}
        return {None: Field(1, {number: weights[e.weight] for number, e in enumerate(entries)}, len(weights))}
    numbers: dict[Shape, list[int]] = defaultdict(list)
    for number, entry in enumerate(entries):
        if entry.split(ask.dim):
            numbers[entry.shape].append(number)
    return {
        shape: Field(_length(ask, shape.rows, shape.cols), {n: row for row, n in enumerate(found)}, len(found))
        for shape, found in numbers.items()
    }


def _length(ask: Ask, rows: int, cols: int) -> int:
    """Elements of one answer about a whole matrix: one per row or column, unless a statistic is reduced further."""
    if ask.of != "like" or ask.dim is None:
        return 1
    return rows if ask.dim == -1 else cols
