"""Who computes which matrix."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

Load = tuple[float, float]


def assign_owners(costs: Sequence[Load], ranks: int) -> list[int]:
    """Longest processing time first: give each item, heaviest first, to the least loaded of so many ranks; see
    `assign_homes`."""
    return [rank for (rank,) in assign_homes(costs, [1] * len(costs), [(0.0, 0.0)] * ranks)]


def assign_homes(costs: Sequence[Load], counts: Sequence[int], busy: Sequence[Load]) -> list[tuple[int, ...]]:
    """Give each item, heaviest first, to as many of the least loaded ranks as it wants.

    Args:
        costs: (cost, bytes) per item, for each of the ranks it goes to; bytes break ties, so that equal work also means
            equal bytes.
        counts: how many ranks each item goes to.
        busy: load that each rank has already.

    Returns:
        The ranks per item, ascending. The order of equal items is theirs, so the result is the same everywhere.
    """
    heap = [(*load, rank) for rank, load in enumerate(busy)]
    heapq.heapify(heap)
    homes: list[tuple[int, ...]] = [()] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i][0], -costs[i][1], i)):
        taken = [heapq.heappop(heap) for _ in range(counts[item])]
        homes[item] = tuple(sorted(rank for _, _, rank in taken))
        for cost, numbytes, rank in taken:
            heapq.heappush(heap, (cost + costs[item][0], numbytes + costs[item][1], rank))
    return homes


def spread_turns(
    owners: Sequence[int],
    alike: Sequence[Hashable],
    work: Sequence[Sequence[tuple[int, float]]],
    ranks: int,
    turns: int,
) -> list[int]:
    """Let items that are alike in all but their turns change places, so that what one rank has to do recurs in different
    steps. Every rank keeps as many of each kind, and so its mean cost, its bytes and its states.

    Args:
        owners: the rank of each item.
        alike: what tells kinds of items apart.
        work: (turn, cost) of each item's recurring work.

    Returns:
        The new ranks: kinds with the heaviest work first, each item to where least is done in its turns; then changes of
        two places for as long as they make the busiest turn of a rank shorter.
    """
    kinds: dict[Hashable, list[int]] = defaultdict(list)
    costs = np.zeros((len(owners), turns))
    for item, recurring in enumerate(work):
        if recurring:
            kinds[alike[item]].append(item)
        for when, cost in recurring:
            costs[item, when] += cost
    load = np.zeros((ranks, turns))
    found = np.array(owners)
    for items in sorted(kinds.values(), key=lambda items: -costs[items[0]].max()):
        places = np.bincount([owners[item] for item in items], minlength=ranks)
        for item in items:
            found[item] = np.where(places > 0, load @ costs[item], np.inf).argmin()
            places[found[item]] -= 1
            load[found[item]] += costs[item]
    for _ in owners:
        rank, turn = divmod(int(load.argmax()), turns)
        best, least = (-1, -1), load.max()
        for item in np.flatnonzero((found == rank) & (costs[:, turn] > 0)).tolist():
            others = np.array(kinds[alike[item]])
            moved = costs[others] - costs[item]
            most = np.maximum((load[rank] + moved).max(1), (load[found[others]] - moved).max(1))
            most[found[others] == rank] = np.inf
            if most.min() < least:
                best, least = (item, int(others[most.argmin()])), most.min()
        if best == (-1, -1):
            break
        one, other = best
        load[rank] += costs[other] - costs[one]
        load[found[other]] += costs[one] - costs[other]
        found[[one, other]] = found[[other, one]]
    return [int(rank) for rank in found]
