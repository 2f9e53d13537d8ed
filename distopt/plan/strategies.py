"""Where a matrix that lies on several ranks is computed.

A strategy is nothing but the matrix's homes: which ranks compute which slices of its long side.

    owner    one home, the whole matrix. P elements over N ranks: every rank sends and receives P(1 − 1/N)/N, there and
             back again.
    gather   every rank is home to all of it: P(1 − 1/N) received there, nothing back, and everybody computes everything.
             One collective instead of two; else never better than owner, also for N = 2.
    gram     the slices follow the layout: nothing travels where a matrix is cut along its long side only, its rows of
             shards otherwise. The homes sum Gram matrices and keep what they computed.
    split    equal slices over a few ranks, chosen as owners are: for a matrix that is more than one rank's share.

With the last two, homes exchange half of a Gram matrix (it is symmetric) per segment of the Gram form, and each evaluates
the same polynomial of it: that part is not divided by the number of homes.

FSDP×TP is no case of its own: on d × t ranks a matrix's owner is one of all N = d·t, so a rank moves 2P(1 − 1/N)/N in a
step, where gathering everything on every rank moves P(1 − 1/N) to it: less by a factor of N/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, get_args

import numpy as np
import torch

from distopt.layouts.region import Rect
from distopt.matrix.triangle import packed_rows
from distopt.plan.geometry import Geometry
from distopt.plan.trace import PieceGuard, trace
from distopt.rule import Rule, Shape, Transform

Strategy = Literal["auto", "owner", "gram", "gather", "split"]

DIRECT = 1024
"""Sums of up to so many elements go to all homes at once: one collective instead of two."""


@dataclass(frozen=True, slots=True)
class Home:
    """A rank, by position in the domain, that computes [start, stop) of a matrix's long side."""

    rank: int
    start: int
    stop: int

    def cut(self, shape: Shape, rect: Rect) -> tuple[int, int, int, int] | None:
        """The part (r0, r1, c0, c1) of a rectangle that is computed here; None where there is none."""
        r0, r1, c0, c1 = rect.r0, rect.r1, rect.c0, rect.c1
        if is_tall(shape):
            r0, r1 = max(r0, self.start), min(r1, self.stop)
        else:
            c0, c1 = max(c0, self.start), min(c1, self.stop)
        return (r0, r1, c0, c1) if r0 < r1 and c0 < c1 else None


def is_tall(shape: Shape) -> bool:
    """Whether rows are the long side."""
    return shape.rows > shape.cols


def sides(shape: Shape) -> tuple[int, int]:
    """(short, long)."""
    return min(shape.rows, shape.cols), max(shape.rows, shape.cols)


def check_strategy(rule: Rule, strategy: str) -> None:
    """Raise ValueError for a strategy that a rule cannot be computed with."""
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy: one of {', '.join(get_args(Strategy))}, got {strategy!r}")
    if strategy == "auto":
        return
    name = type(rule).__name__
    if rule.reach != "matrix":
        raise ValueError(
            f"strategy={strategy!r}: {name} works where parameters lie; leave the option out of this group"
        )
    step, _ = next(iter(rule.phases().values()))
    if strategy in ("gram", "split") and not trace(rule, Shape(8, 8), step, False).asks("through"):
        raise ValueError(f"strategy={strategy!r}: {name} needs whole matrices; use 'auto' or 'owner' for this group")
    if strategy == "gather" and keeps_owner_states(rule):
        raise ValueError(
            f"strategy='gather': {name} keeps states with the one rank that computes a matrix; use 'auto' or 'owner'"
        )


def keeps_owner_states(rule: Rule) -> bool:
    """Whether some state lives where matrices are computed."""
    return any(state.kind == "owner" for state in rule.states(Shape(8, 8)).values())


@dataclass(frozen=True)
class Payload:
    """What is summed over the homes of a matrix in one round: elements, each on the wire as `dtype`."""

    numel: int
    dtype: torch.dtype

    def moved(self, homes: int, index: int) -> int:
        """Elements that one home sends; it receives as many."""
        if self.is_direct(homes):
            return self.numel * (homes - 1)
        cuts = self.cuts(homes)
        own = cuts[index + 1] - cuts[index]
        return self.numel - own + own * (homes - 1)

    def is_direct(self, homes: int) -> bool:
        """Whether each home sends all to every other one, instead of a part to each and then the sum of its own part."""
        return homes == 2 or self.numel <= DIRECT

    def cuts(self, homes: int) -> list[int]:
        """Where the parts begin that the homes sum up, and the end."""
        return [self.numel * i // homes for i in range(homes + 1)]


@lru_cache(maxsize=4096)
def slice_work(transform: Transform, short: int, length: int) -> tuple[dict[str, int], tuple[Payload, ...]]:
    """(FLOPs by kind, what is summed in each round) of one slice (short, length) of a matrix."""
    payloads: list[Payload] = []
    counter = PieceGuard(type(transform).__name__, (1, short, length))
    counter.at_owner = True
    with counter:
        run = transform.by_slices(torch.empty((1, short, length), device="meta"))
        partial = next(run)
        while True:
            _, rows, cols = partial.shape
            payloads.append(Payload(prod((packed_rows(rows) if rows == cols else rows, cols)), partial.dtype))
            try:
                partial = run.send(partial)
            except StopIteration:
                return counter.work, tuple(payloads)


@lru_cache(maxsize=65536)
def held(geometry: Geometry, matrix: int, cuts: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Elements of each slice that lie on each rank of the layout, (ranks, slices)."""
    counts = np.zeros((len(geometry.layout.ranks), len(cuts)), dtype=np.int64)
    homes = [Home(i, *cut) for i, cut in enumerate(cuts)]
    for index in range(len(geometry.layout.ranks)):
        for rect in geometry.pieces_of(index, matrix):
            for i, home in enumerate(homes):
                part = home.cut(geometry.logical.shapes[matrix], rect)
                if part is not None:
                    counts[index, i] += (part[1] - part[0]) * (part[3] - part[2])
    return counts


@lru_cache(maxsize=65536)
def slices_where_it_lies(geometry: Geometry, matrix: int) -> tuple[Home, ...]:
    """Slices in the order, and of the sizes, in which ranks (by position in the layout) hold the matrix along its long
    side: exactly what they hold where it is cut along that side only."""
    shape = geometry.logical.shapes[matrix]
    _, long = sides(shape)
    holders = []
    for index in range(len(geometry.layout.ranks)):
        rects = geometry.pieces_of(index, matrix)
        if rects:
            first = min(rect.r0 if is_tall(shape) else rect.c0 for rect in rects)
            holders.append((first, index, sum(rect.numel for rect in rects)))
    homes, before = [], 0
    for _, index, numel in sorted(holders):
        start, stop = (round(long * elements / shape.numel) for elements in (before, before + numel))
        before += numel
        if start < stop:
            homes.append(Home(index, start, stop))
    return tuple(homes)


def equal_slices(geometry: Geometry, matrix: int, indices: Sequence[int]) -> tuple[Home, ...]:
    """One slice for each of these ranks (by position in the layout), such that all of them receive as much: equal, but
    for what they hold of theirs already."""
    short, long = sides(geometry.logical.shapes[matrix])
    count = len(indices)
    even = tuple((long * i // count, long * (i + 1) // count) for i in range(count))
    there = held(geometry, matrix, even)
    own = [int(there[index, i]) // short for i, index in enumerate(indices)]
    ends = [(long - sum(own)) * (i + 1) // count + sum(own[: i + 1]) for i in range(count)]
    return tuple(Home(*home) for home in zip(indices, [0, *ends], ends) if home[1] < home[2])
