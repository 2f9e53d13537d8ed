"""Who computes which matrix."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

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
