"""Who computes which matrix."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Load = tuple[float, float]


def assign_owners(costs: Sequence[Load], ranks: int, busy: Sequence[Load] | None = None) -> list[int]:
    """Longest processing time first: give each item, heaviest first, to the least loaded rank.

    Args:
        costs: (cost, elements) per item; elements break ties, so that equal work also means equal bytes.
        ranks: how many there are to choose from.
        busy: load that each rank has already.

    Returns:
        The rank per item. The order of equal items is theirs, so the result is the same everywhere.
    """
    heap = [(*(busy[rank] if busy else (0.0, 0.0)), rank) for rank in range(ranks)]
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i][0], -costs[i][1], i)):
        cost, elements, rank = heapq.heappop(heap)
        owners[item] = rank
        heapq.heappush(heap, (cost + costs[item][0], elements + costs[item][1], rank))
    return owners
