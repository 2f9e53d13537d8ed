"""What every layout answers, and the two simplest: whole on every rank, and partitioned over replicas."""

from __future__ import annotations

from dataclasses import dataclass

from distopt.layouts.region import Rect, flat_rects


class Ranks(tuple[int, ...]):
    """A tuple of ranks that hashes once: a thousand ranks are hashed for every parameter and every look-up otherwise."""

    _hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = super().__hash__()
        return self._hash


@dataclass(frozen=True)
class Layout:
    """The map rank → regions of one parameter.

    Attributes:
        shape: the global tensor's.
        ranks: the global ranks that jointly hold one copy of it, in a fixed order that all of them agree on.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.ranks, Ranks):
            object.__setattr__(self, "ranks", Ranks(self.ranks))

    def rects(self, index: int, row_dims: int) -> list[Rect]:
        """The rectangles that `ranks[index]` holds, in the matrix view with `row_dims` row dims."""
        raise NotImplementedError

    def describe(self) -> str:
        """A short word for explain()."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Layout):
    """The whole tensor here; replicas, where there are some, keep themselves equal."""

    def rects(self, index: int, row_dims: int) -> list[Rect]:
        rows, cols = matrix_view(self.shape, row_dims)
        return [Rect(0, rows, 0, cols, 0, cols)] if rows * cols else []

    def describe(self) -> str:
        return "whole"


@dataclass(frozen=True)
class Partition(Layout):
    """Replicas share the work: `ranks[i]` takes elements [cuts[i], cuts[i+1]) of the flattened tensor.

    Storage stays whole on every rank; the engine works on the window and gathers what was updated.
    """

    cuts: tuple[int, ...] = ()

    def rects(self, index: int, row_dims: int) -> list[Rect]:
        return flat_rects(matrix_view(self.shape, row_dims)[1], self.cuts[index], self.cuts[index + 1])

    def describe(self) -> str:
        return f"partitioned over {len(self.ranks)} replicas"


def matrix_view(shape: tuple[int, ...], row_dims: int) -> tuple[int, int]:
    """(rows, cols) of a tensor whose first `row_dims` dims are rows."""
    rows = cols = 1
    for size in shape[:row_dims]:
        rows *= size
    for size in shape[row_dims:]:
        cols *= size
    return rows, cols
