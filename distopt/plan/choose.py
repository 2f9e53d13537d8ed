"""Which strategy each matrix gets: the one whose slowest rank ends first, in the cost model.

Owners are dealt out first. Where they leave ranks idle because some matrices are more than one rank's share, these are
split, into the fewest parts that keep a limit on the time of one part; the limit with the best outcome is taken. Slices
where a matrix lies, and gathering, are tried where they can gain anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from distopt.plan.cost import Rates
from distopt.plan.geometry import Geometry
from distopt.plan.owners import assign_homes
from distopt.plan.strategies import (
    Home,
    Strategy,
    equal_slices,
    held,
    keeps_owner_states,
    sides,
    slice_work,
    slices_where_it_lies,
)
from distopt.plan.trace import Rounds
from distopt.rule import Rule, Shape

GAIN = 0.9
"""What another strategy than owner must bring: it changes rounding, and the model is no better than this."""


@dataclass(frozen=True)
class Item:
    """One matrix to be given homes: FLOPs of the whole by kind, and the positions of its layout's ranks in the domain."""

    geometry: Geometry
    matrix: int
    work: Mapping[str, float]
    positions: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        """Of the logical matrix."""
        return self.geometry.logical.shapes[self.matrix]

    def homes(self, slices: Sequence[Home]) -> tuple[Home, ...]:
        """Slices by position in the layout as slices by position in the domain."""
        return tuple(Home(self.positions[home.rank], home.start, home.stop) for home in slices)


FLOPS, COMPUTE, BYTES = range(3)
Loads = np.ndarray
"""FLOPs, seconds that they take, and bytes sent or received, of each rank: (3, ranks)."""


def cost(rates: Rates, work: Mapping[str, float], numbytes: float) -> tuple[float, float, float]:
    """One column of Loads."""
    return sum(work.values()), rates.compute_seconds(work), numbytes


@dataclass(frozen=True)
class Trial:
    """One way to compute all matrices of a domain: the ranks of each, and the seconds of the slowest rank and of the mean.
    Matrices of the shapes in `following` are computed where they lie."""

    following: frozenset[Shape]
    ranks: list[tuple[int, ...]]
    seconds: float
    mean: float


@dataclass(frozen=True)
class Choice:
    """How all matrices of a domain are computed: their strategies and homes, and what all ranks have to do."""

    strategies: list[str]
    homes: list[tuple[Home, ...]]
    loads: Loads


class Chooser:
    """Chooses homes for the matrices of one domain, all of which ask for the same things. `busy` are loads that the ranks
    have already."""

    def __init__(
        self,
        rule: Rule,
        items: Sequence[Item],
        ranks: tuple[int, ...],
        rounds: Rounds,
        busy: Loads,
        rates: Rates,
    ) -> None:
        self.rule, self.items, self.ranks, self.busy = rule, items, ranks, busy
        self.rates, self.link = rates, rates.link(ranks)
        asks = [ask for asks in rounds for ask in asks]
        self.itemsize = next(ask.dtype.itemsize for ask in asks if ask.kind == "whole")
        self.transform = next((ask.transform for ask in asks if ask.kind == "through"), None)
        self.examples = {item.shape: item for item in reversed(items)}

    def choose(self, strategy: Strategy) -> Choice:
        """The strategy that a group forces, or the one for each matrix that ends first."""
        if strategy == "gather":
            return self._gathered()
        if strategy == "gram":
            return self._settled(self._try({}, frozenset(self.examples)))
        if strategy == "split":
            return self._settled(min(map(self._try, self._splits(2)), key=lambda trial: trial.seconds))
        owned = self._try({})
        if strategy == "owner":
            return self._settled(owned)
        ways: list[Trial] = []
        if self.transform is not None:
            if owned.seconds > owned.mean / GAIN:
                ways += map(self._try, self._splits(1))
            cheaper = frozenset(shape for shape, item in self.examples.items() if self._follows_cheaply(item))
            ways += [self._try({}, cheaper)] if cheaper else []
        # Of several that are as good the first: it has the fewest parts.
        best = min(ways, key=lambda trial: trial.seconds, default=owned)
        best = best if best.seconds < GAIN * owned.seconds else owned
        if not keeps_owner_states(self.rule) and self._total(self._gather_loads(), 1) < GAIN * best.seconds:
            return self._gathered()
        return self._settled(best)

    def _splits(self, fewest: int) -> list[dict[Shape, int]]:
        """Parts per shape, for each of several limits on the time of one home: the fewest that keep it."""
        parts = sorted({n for power in (1, 2, 4, 8, 16, 32) for n in (power, power * 3 // 2)})
        times: dict[Shape, dict[int, float]] = {}
        for shape, item in self.examples.items():
            possible = [n for n in parts if fewest <= n <= min(len(self.ranks), sides(shape)[1])]
            times[shape] = {n: self._seconds(np.array(self._part(item, n))) for n in possible or [1]}
        found: list[dict[Shape, int]] = []
        for limit in sorted({seconds for by_parts in times.values() for seconds in by_parts.values()}, reverse=True):
            kept = {}
            for shape, by_parts in times.items():
                short_enough = [n for n, seconds in by_parts.items() if seconds <= limit]
                kept[shape] = min(short_enough or by_parts, key=lambda n: n if short_enough else by_parts[n])
            if kept not in found:
                found.append(kept)
        return found

    def _seconds(self, loads: Loads) -> Any:
        return loads[COMPUTE] + loads[BYTES] / self.link.bandwidth

    def _part(self, item: Item, parts: int) -> tuple[float, float, float]:
        """Loads of one home of several that are equal, which holds as much of its slice as any rank does."""
        short, long = sides(item.shape)
        length = ceil(long / parts)
        return self._slice(item, parts, 0, length, short * length / len(self.ranks))

    def _slice(self, item: Item, homes: int, index: int, length: int, there: float) -> tuple[float, float, float]:
        """Loads of one home of several, which holds so many elements of its slice already."""
        short, _ = sides(item.shape)
        numbytes = 2 * self.itemsize * (short * length - there)
        if homes == 1:
            return cost(self.rates, item.work, numbytes)
        assert self.transform is not None
        work, payloads = slice_work(self.transform, short, length)
        summed = sum(payload.moved(homes, index) * payload.dtype.itemsize for payload in payloads)
        return cost(self.rates, work, numbytes + summed)

    def _loads(self, item: Item, homes: Sequence[Home]) -> Loads:
        """Of every rank, from one matrix with these homes (by position in the layout)."""
        loads = np.zeros((3, len(self.ranks)))
        there = held(item.geometry, item.matrix, tuple((home.start, home.stop) for home in homes))
        for i, home in enumerate(homes):
            part = self._slice(item, len(homes), i, home.stop - home.start, int(there[home.rank, i]))
            loads[:, item.positions[home.rank]] = part
        return loads

    def _follows_cheaply(self, item: Item) -> bool:
        """Whether all ranks together need less time for slices where a matrix lies than for an owner."""
        loads = self._loads(item, slices_where_it_lies(item.geometry, item.matrix))
        return bool(self._seconds(loads.sum(1)) < self._seconds(np.array(self._part(item, 1))))

    def _try(self, parts: Mapping[Shape, int], following: frozenset[Shape] = frozenset()) -> Trial:
        """Slices that follow the layout for some shapes; for the others so many equal ones, over the ranks that have least
        to do."""
        loads = self.busy.copy()
        counts, costs, rest = [], [], []
        memo: dict[Any, Any] = {}
        for number, item in enumerate(self.items):
            if item.shape in following:
                key = item.geometry, item.matrix
                if key not in memo:
                    memo[key] = self._loads(item, slices_where_it_lies(*key))
                loads += memo[key]
                continue
            if item.shape not in memo:
                part = self._part(item, parts.get(item.shape, 1))
                memo[item.shape] = part, (float(self._seconds(np.array(part))), part[BYTES])
            rest.append(number)
            costs.append(memo[item.shape])
            counts.append(parts.get(item.shape, 1))
        ranks: list[tuple[int, ...]] = [()] * len(self.items)
        before = list(zip(self._seconds(loads).tolist(), loads[BYTES].tolist()))
        for number, (part, _), found in zip(rest, costs, assign_homes([time for _, time in costs], counts, before)):
            ranks[number] = found
            for rank in found:
                loads[:, rank] += part
        collectives = 2 if 1 in counts else 0
        if following or max(counts, default=1) > 1:
            assert self.transform is not None
            collectives += 2 + 2 * len(slice_work(self.transform, 1, 1)[1])
        mean = self._seconds(loads).mean() + collectives * self.link.latency
        return Trial(following, ranks, self._total(loads, collectives), mean)

    def _settled(self, trial: Trial) -> Choice:
        """A trial with its slices, and the loads of exactly these."""
        loads, strategies, homes = self.busy.copy(), [], []
        for item, ranks in zip(self.items, trial.ranks):
            indices = [item.positions.index(rank) for rank in ranks]
            if item.shape in trial.following:
                slices, strategy = slices_where_it_lies(item.geometry, item.matrix), "gram"
            elif len(ranks) > 1:
                slices, strategy = equal_slices(item.geometry, item.matrix, indices), "split"
            else:
                slices, strategy = (Home(indices[0], 0, sides(item.shape)[1]),), "owner"
            strategies.append(strategy if len(slices) > 1 else "owner")
            homes.append(item.homes(slices))
            if len(slices) > 1:
                loads += self._loads(item, slices)
            else:
                loads[:, homes[-1][0].rank] += self._part(item, 1)
        return Choice(strategies, homes, loads)

    def _gathered(self) -> Choice:
        """All matrices on all ranks."""
        homes = [tuple(Home(rank, 0, sides(item.shape)[1]) for rank in item.positions) for item in self.items]
        return Choice(["gather"] * len(self.items), homes, self._gather_loads())

    def _gather_loads(self) -> Loads:
        loads = self.busy.copy()
        for item in self.items:
            elements = item.shape.numel * (1 - 1 / len(self.ranks))
            loads += np.array(cost(self.rates, item.work, self.itemsize * elements))[:, None]
        return loads

    def _total(self, loads: Loads, collectives: int) -> float:
        return float(self._seconds(loads).max()) + collectives * self.link.latency
