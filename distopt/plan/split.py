"""Splits: how a user says which matrices a weight is made of, and the cuts of its two dims that follow.

A split is a line of words. One of them may name the parts that lie one after the other along the output dim:

    "q,k,v"                            equal parts
    "q:1024,k:256,v:256"               sizes in rows
    "q:32h,k:8h,v:8h"                  sizes in heads, all of one size (grouped-query attention)

The others say how the parts lie, and whether heads are matrices of their own:

    per_head                           a matrix per head: sizes are in heads, or each repeat is one
    heads=32                           one part of 32 heads, per head
    interleaved=16                     the parts come 16 times in turn, each time a 16th of each (GPT-NeoX: q, k and v
                                       head by head); a part is its pieces put together again
    cols                               parts lie along the input dim (output projections by head: "heads=32 cols")
    transposed                         stored as (in, out), as transformers' Conv1D: the matrix is the transpose
    flattened                          one matrix (first dim, all others)

With three dims each entry of the leading one is split so (experts).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import NamedTuple

from distopt.rule import require

FLAGS = ("per_head", "cols", "transposed", "flattened")
PART = re.compile(r"([A-Za-z_]\w*)(?::(\d+)(h?))?")


class Part(NamedTuple):
    """A named part of a dim: its size in rows or in heads, or neither where all parts are equal."""

    name: str
    rows: int | None = None
    heads: int | None = None


@dataclass(frozen=True)
class Split:
    """What a line of words says; see the module."""

    parts: tuple[Part, ...] = (Part(""),)
    interleaved: int = 1
    per_head: bool = False
    cols: bool = False
    transposed: bool = False
    flattened: bool = False

    def sizes(self, length: int) -> list[tuple[str, int, int]]:
        """(name, rows, heads) of each part of a dim of this length; heads is 0 where it is not split by them.

        Raises:
            ValueError: the parts do not add up to it, or something does not divide.
        """
        count, along = len(self.parts), "columns" if self.cols else "rows"
        total = sum(part.heads or 0 for part in self.parts)
        if total:
            require(length % total == 0, f"{length} {along} do not divide into {total} heads")
            found = [(part.name, (part.heads or 0) * (length // total), part.heads or 0) for part in self.parts]
        elif self.parts[0].rows is None:
            require(length % count == 0, f"{length} {along} do not divide into {count} equal parts; give their sizes")
            found = [(part.name, length // count, self.interleaved) for part in self.parts]
        else:
            found = [(part.name, part.rows or 0, self.interleaved) for part in self.parts]
            said = sum(size for _, size, _ in found)
            require(said == length, f"the parts add up to {said} of {length} {along}")
        for name, size, heads in found:
            for what, number in (("rows", size), ("heads", heads)):
                require(
                    number % self.interleaved == 0,
                    f"{number} {what} of part {name!r} do not divide into interleaved={self.interleaved}",
                )
        return [(name, size, heads if self.per_head else 0) for name, size, heads in found]


@lru_cache(maxsize=1024)
def parse_split(text: str) -> Split:
    """Read a line of words.

    Raises:
        ValueError: a word that is not known, or words that do not go together.
    """
    parts: tuple[Part, ...] = ()
    numbers: dict[str, int] = {}
    flags: set[str] = set()
    for word in text.split():
        key, is_number, value = word.partition("=")
        if is_number and key in ("heads", "interleaved"):
            require(value.isdigit() and int(value) > 0, f"{word!r}: {key} must be a number ≥ 1")
            numbers[key] = int(value)
        elif word in FLAGS:
            flags.add(word)
        else:
            found = [PART.fullmatch(item) for item in word.split(",")]
            near = get_close_matches(word, [*FLAGS, "heads", "interleaved"], n=1)
            alone = len(found) == 1 and found[0] is not None and found[0][2] is None
            require(
                all(found) and not alone and not (near and len(found) == 1),
                f"unknown word {word!r}{f', did you mean {near[0]!r}?' if near else ''} (parts like q:32h,k:8h,v:8h or "
                f"q,k,v; heads=N, interleaved=N, {', '.join(FLAGS)})",
            )
            require(not parts, f"parts are named twice, the second time as {word!r}")
            parts = tuple(_part(match) for match in found if match)
    if "heads" in numbers:
        require(not parts, "heads=N is for one part; give the heads of each as in q:32h,k:8h,v:8h per_head")
        parts, flags = (Part("", None, numbers["heads"]),), flags | {"per_head"}
    parts = parts or (Part(""),)
    units = {(part.rows is None, part.heads is None) for part in parts}
    require(len(units) == 1, "sizes must be all in rows, all in heads, or not given")
    require(len({part.name for part in parts}) == len(parts), "two parts have one name")
    require(all(part.rows != 0 and part.heads != 0 for part in parts), "a part has size 0")
    interleaved = numbers.get("interleaved", 1)
    require(
        "per_head" not in flags or parts[0].heads is not None or interleaved > 1,
        "per_head needs the number of heads: sizes like q:32h, or heads=32",
    )
    return Split(parts, interleaved, *(flag in flags for flag in FLAGS))


def _part(match: re.Match[str]) -> Part:
    name, number, unit = match.groups()
    size = None if number is None else int(number)
    return Part(name, None, size) if unit else Part(name, size)


class Segment(NamedTuple):
    """Positions [start, stop) of a dim are [at, at + stop − start) of a part."""

    start: int
    stop: int
    part: int
    at: int


@dataclass(frozen=True, eq=False)
class Cuts:
    """One dim of a matrix view, cut into parts: `segments` in the order in which they lie; per part `sizes`, `names`, and
    which of the `weights` it belongs to, that would be stored apart if there were no split (all copies of one part)."""

    segments: tuple[Segment, ...]
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    weights: tuple[int, ...]

    def overlaps(self, start: int, stop: int) -> Iterator[Segment]:
        """The segments within [start, stop), cut to it."""
        for position in range(bisect_right(self._starts, start) - 1, len(self.segments)):
            segment = self.segments[position]
            if segment.start >= stop:
                return
            low, high = max(start, segment.start), min(stop, segment.stop)
            yield Segment(low, high, segment.part, segment.at + low - segment.start)

    @cached_property
    def _starts(self) -> list[int]:
        return [segment.start for segment in self.segments]


def cut_dim(length: int, copies: int = 1, split: Split | None = None, block: int | None = None) -> Cuts:
    """Cut a dim of `copies` times `length`: every copy by the split, every part into blocks, the last of them short.

    Raises:
        ValueError: as `Split.sizes`.
    """
    if not length * copies:
        return Cuts((), (), (), ())
    if split is None and block is None:
        segments = tuple(Segment(i * length, (i + 1) * length, i, 0) for i in range(copies))
        return Cuts(segments, (length,) * copies, ("",) * copies, (0,) * copies)
    sizes = split.sizes(length) if split else [("", length, 0)]
    repeats = split.interleaved if split else 1
    runs: list[tuple[int, tuple[int, int, int]]] = []  # (length, (part, head, copy)), in the order in which they lie
    for copy in range(copies):
        for repeat in range(repeats):
            for part, (_, size, heads) in enumerate(sizes):
                here = max(heads // repeats, 1)
                for head in range(repeat * here, (repeat + 1) * here):
                    runs.append((size // repeats // here, (part, head if heads else 0, copy)))
    seen: dict[tuple[int, ...], int] = {}  # how much of each part has come
    pieces: list[tuple[int, int, tuple[int, ...], int]] = []
    start = 0
    for size, key in runs:
        stop = start + size
        while start < stop:
            at = seen.get(key, 0)
            end = min(stop, start + block - at % block) if block else stop
            pieces.append((start, end, (*key, at // block if block else 0), at % block if block else at))
            seen[key] = at + end - start
            start = end
    keys = sorted({key for _, _, key, _ in pieces})
    number = {key: i for i, key in enumerate(keys)}
    totals = [0] * len(keys)
    for low, high, name, _ in pieces:
        totals[number[name]] += high - low
    segments = tuple(Segment(low, high, number[name], at) for low, high, name, at in pieces)
    families = sorted({key[:2] for key in keys})
    weights = tuple(families.index(key[:2]) for key in keys)
    return Cuts(segments, tuple(totals), tuple(sizes[key[0]][0] for key in keys), weights)
