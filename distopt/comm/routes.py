"""From a plan to an exchange: which rectangles of which matrices go where."""

from __future__ import annotations

from collections.abc import Sequence

from distopt.comm.exchange import Exchange, Segment
from distopt.comm.groups import Domain
from distopt.plan.buckets import Bucket
from distopt.plan.strategies import is_tall


def routes(bucket: Bucket, indices: Sequence[int], domain: Domain) -> tuple[Exchange, Exchange]:
    """Where every piece of this rank goes, and where every piece of what is computed here comes from: there and back.

    Args:
        bucket: its matrices have homes.
        indices: this rank's position in the layout of each parameter of the group.
        domain: the bucket's.
    """
    pieces: list[list[Segment]] = [[] for _ in range(domain.size)]
    owned: list[list[Segment]] = [[] for _ in range(domain.size)]
    place = {(p.entry, p.rect): (s, i) for s, stack in enumerate(bucket.stacks) for i, p in enumerate(stack.pieces)}
    at = {number: (s, i) for s, group in enumerate(bucket.owned) for i, number in enumerate(group.entries)}
    for number, entry in enumerate(bucket.entries):
        geometry, shape = entry.geometry, entry.shape
        for home in entry.homes:
            for rect in geometry.pieces_of(indices[entry.param], entry.matrix):
                part = home.cut(shape, rect)
                if part is not None:
                    pieces[home.rank].append(_segment(*place[number, rect], part, rect.r0, rect.c0))
            if home.rank != domain.me:
                continue
            first = (home.start, 0) if is_tall(shape) else (0, home.start)
            for index, rank in enumerate(geometry.layout.ranks):
                for rect in geometry.pieces_of(index, entry.matrix):
                    part = home.cut(shape, rect)
                    if part is not None:
                        owned[domain.ranks.index(rank)].append(_segment(*at[number], part, *first))
    there = Exchange(domain, pieces, owned, bucket.travels)
    if bucket.strategy != "gather":
        return there, there
    # Everybody has everything: what comes back is one's own.
    pieces = [segments if peer == domain.me else [] for peer, segments in enumerate(pieces)]
    owned = [segments if peer == domain.me else [] for peer, segments in enumerate(owned)]
    return there, Exchange(domain, pieces, owned, travels=False)


def _segment(stack: int, item: int, part: tuple[int, int, int, int], row: int, col: int) -> Segment:
    r0, r1, c0, c1 = part
    return Segment(stack, item, r0 - row, r1 - row, c0 - col, c1 - col)
