"""What a plan is made of: parameters, their logical matrices, and the stacks and buckets that these are computed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from distopt.layouts.base import Layout
from distopt.layouts.region import Rect
from distopt.plan.choose import FLOPS, Loads
from distopt.plan.cost import CPU, H100, Rates
from distopt.plan.geometry import Geometry, Logical, logical_of
from distopt.plan.strategies import Home, Strategy, held, is_tall
from distopt.plan.tiles import Storage
from distopt.plan.trace import Rounds, Trace, on_the_wire, trace
from distopt.rule import Rule, Shape


@dataclass(frozen=True)
class Spec:
    """What the plan knows of a parameter: `index` is this rank's position in the layout."""

    name: str
    layout: Layout
    index: int
    dtype: torch.dtype = torch.float32

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the parameter."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """One parameter group: its rule, and the options that shape its plan."""

    rule: Rule
    specs: tuple[Spec, ...]
    replicas: tuple[int, ...] | None = None
    gpu: bool = False
    storage: Storage = field(default_factory=Storage)
    split: str | None = None
    strategy: Strategy = "auto"
    rates: Rates | None = None
    wire: torch.dtype = torch.float32


@dataclass(frozen=True)
class Entry:
    """One logical matrix of a bucket: when its recurring work is done, and who computes which slices of it."""

    param: int
    matrix: int
    shape: Shape
    geometry: Geometry
    turns: tuple[int, ...] = ()
    homes: tuple[Home, ...] = ()

    @property
    def owner(self) -> int | None:
        """The first home's position in the bucket's domain; the only one but for matrices that have several."""
        return self.homes[0].rank if self.homes else None

    @property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        """The slices of the long side."""
        return tuple((home.start, home.stop) for home in self.homes)

    @property
    def weight(self) -> tuple[int, int]:
        """The parameter, and which of its weights this matrix belongs to."""
        return self.param, self.geometry.logical.weights[self.matrix]

    def split(self, dim: int | None) -> bool:
        """Whether some rank holds a piece that lacks part of this dim."""
        return self.geometry.split[dim][self.matrix]


@dataclass(frozen=True)
class Piece:
    """A rectangle of an entry's matrix (index `entry` in the bucket), and where it lies in its parameter's window."""

    entry: int
    param: int
    rect: Rect


@dataclass(frozen=True)
class Stack:
    """Pieces of this rank with the same logical shape, rectangle and turns, handed to the rule at once."""

    shape: Shape
    pieces: tuple[Piece, ...]
    turns: tuple[int, ...] = ()

    @property
    def rect(self) -> Rect:
        """The rectangle, which all pieces share (offsets differ)."""
        return self.pieces[0].rect

    @property
    def size(self) -> tuple[int, int, int]:
        """(k, rows, cols) of the stack."""
        rect = self.rect
        return len(self.pieces), rect.r1 - rect.r0, rect.c1 - rect.c0


@dataclass(frozen=True)
class Owned:
    """Matrices of one shape, with the same turns, that this rank computes together, all of each or slices of one length of
    their long side: indices of entries."""

    shape: Shape
    entries: tuple[int, ...]
    length: int
    turns: tuple[int, ...] = ()

    @property
    def size(self) -> tuple[int, int, int]:
        """(k, rows, cols) of the stack."""
        if is_tall(self.shape):
            return len(self.entries), self.length, self.shape.cols
        return len(self.entries), self.shape.rows, self.length


@dataclass(frozen=True)
class Bucket:
    """Work moved and computed together, by one `strategy`: "in place", or one of `plan.strategies`."""

    ranks: tuple[int, ...]
    entries: tuple[Entry, ...]
    stacks: tuple[Stack, ...]
    owned: tuple[Owned, ...]
    strategy: str

    @property
    def exchanged(self) -> bool:
        """Whether matrices have homes; else each is computed where it lies."""
        return self.strategy != "in place"

    @property
    def sliced(self) -> bool:
        """Whether matrices have several homes, each with a slice."""
        return self.strategy in ("gram", "split")

    @property
    def travels(self) -> bool:
        """Whether any element of any rank lies elsewhere than at its matrix's home."""
        if self.strategy != "gram":
            return self.exchanged
        for entry in self.entries:
            ranks = entry.geometry.layout.ranks
            there = held(entry.geometry, entry.matrix, entry.cuts)
            for number, home in enumerate(entry.homes):
                if there[ranks.index(self.ranks[home.rank]), number] < there[:, number].sum():
                    return True
        return False


@dataclass
class GroupPlan:
    """What one parameter group does in a step."""

    rule: Rule
    specs: tuple[Spec, ...]
    gpu: bool
    storage: Storage = field(default_factory=Storage)
    split: str | None = None
    wire: torch.dtype = torch.float32
    buckets: list[Bucket] = field(default_factory=list)
    costs: dict[tuple[int, ...], Loads] = field(default_factory=dict)
    """Per domain, what each rank does per step for the matrices that are computed there."""
    homes: dict[tuple[int, ...], list[Entry]] = field(default_factory=dict)
    """Per domain, every matrix of every rank with its owner."""
    rates: Rates | None = None
    pages: dict[Any, list[Any]] = field(default_factory=dict)
    """What is paged, see `plan.pages`."""
    hosted: set[int] = field(default_factory=set)
    """The first parameters of units that are stepped on the host, the same on every rank."""

    @property
    def machine(self) -> Rates:
        """What the cost model counts with."""
        return self.rates or (H100 if self.gpu else CPU)

    @property
    def loads(self) -> dict[tuple[int, ...], np.ndarray]:
        """Per domain, FLOPs per step and rank."""
        return {ranks: costs[FLOPS] for ranks, costs in self.costs.items()}

    @property
    def elementwise(self) -> bool:
        """Whether the group needs neither sums nor matrices."""
        return self.rule.reach == "elementwise"

    def logical(self, number: int) -> Logical:
        """How the rule reads parameter `number`."""
        return logical_of(self.specs[number].layout.shape, self.rule, self.split)

    def rounds(self, shape: Shape) -> Rounds:
        """What the rule asks for, round by round: the same in every step, as the plan's bytes are."""
        return next(self.traces(shape))[2].rounds

    def traces(self, shape: Shape) -> Iterator[tuple[str, float, Trace]]:
        """(phase, share of steps, trace) for a logical shape."""
        for phase, (step, share) in self.rule.phases().items():
            found = trace(self.rule, shape, step, self.gpu)
            yield phase, share, replace(found, rounds=on_the_wire(found.rounds, self.wire))
