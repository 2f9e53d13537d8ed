"""Units: parameters whose states are stored as codes, one by one or small ones together, and how they are read."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.groups import Domain, Domains
from distopt.plan.build import GroupPlan
from distopt.plan.tiles import CHUNK, GPU_CHUNK, Tiles, join_tiles, local_tiles, shared_tiles, tile_starts
from distopt.rule import State
from distopt.state.codecs import FP32, Codec
from distopt.state.coded import Agreed, Coded, Span, agree
from distopt.state.master import Master
from distopt.state.noise import Key
from distopt.state.windows import Window

MASTER = "master"
"""What state dicts call fp32 weights beside parameters of lower precision."""
Values = dict[tuple[int, int | None, str], Tensor]
"""By parameter number, matrix (None: of the whole parameter) and name."""


@dataclass
class Section:
    """A run of a unit's elements whose codes lie together: all of it.

    Attributes:
        elements, tiles: which of the unit's.
        cuts: which of the tiles that an edge of a shard cuts.
        stores: the codes and scales of these elements, by state name.
        rest: what parameters of lower precision lack of fp32 weights; or None.
    """

    elements: slice
    tiles: slice
    cuts: slice
    stores: dict[str, Coded]
    rest: Tensor | None
    shape: Tiles

    @property
    def is_cut(self) -> bool:
        """Whether an edge of a shard cuts any of its tiles."""
        return self.cuts.start < self.cuts.stop

    def within(self, span: slice) -> slice:
        """A span of the unit's elements, counted from the first one here."""
        return slice(span.start - self.elements.start, span.stop - self.elements.start)

    def spans(self, device: torch.device) -> Iterator[tuple[slice, dict[str, Span]]]:
        """Runs of the unit's elements, with the span of each store."""
        chunk, first = CHUNK if device.type == "cpu" else GPU_CHUNK, self.elements.start
        for number, (_, _, start, stop) in enumerate(self.shape.spans(chunk)):
            yield slice(first + start, first + stop), {n: store.spans[number] for n, store in self.stores.items()}


class Unit:
    """Parameters of one domain whose coded states lie in common stores, in order.

    Attributes:
        members: their numbers in the group.
        parts, tile_parts: where each lies among the unit's elements, and its tiles among the unit's.
        stores: by state name.
        sections: what the stores hold, cut into runs of elements.
        master, rest: how what parameters of lower precision lack of fp32 weights is kept, and that; or None.
    """

    def __init__(
        self, plan: GroupPlan, windows: list[Window], members: list[int], states: Mapping[str, State], domain: Domain
    ) -> None:
        self.members, self.domain = members, domain
        self.windows = [windows[i] for i in members]
        sizes = [window.numel for window in self.windows]
        self.parts = {i: slice(a, b) for i, (a, b) in zip(members, pairwise(accumulate(sizes, initial=0)))}
        self.stores: dict[str, Coded] = {}
        self.slots: dict[str, int] = {}
        specs = [window.spec for window in self.windows]
        first = self.windows[0]
        slots = [len(shared_tiles(spec.layout)) for spec in specs]
        tiles = [local_tiles(spec.layout, spec.index) for spec in specs]
        self.tiles = join_tiles(tiles, slots)
        edges = pairwise(accumulate((part.count for part in tiles), initial=0))
        self.tile_parts = {i: slice(a, b) for i, (a, b) in zip(members, edges)}
        self.master: Master | None = plan.storage.master if plan.storage.mastered(first.spec.itemsize) else None
        self.rest: Tensor | None = None
        if self.master is not None:
            weights = torch.cat([window.weight() for window in self.windows])
            self.rest = self.master.split(weights.float(), weights.dtype)[1].clone()
        firsts = list(accumulate((prod(spec.layout.shape) for spec in plan.specs), initial=0))
        for name, state in states.items():
            codec: Codec = plan.storage.codec(name, state, first.spec.layout.shape) or FP32()
            starts = None
            if codec.stochastic:
                starts = np.concatenate([tile_starts(s.layout, s.index) + firsts[i] for s, i in zip(specs, members)])
            fill = 0.0 if state.fill == "weight" else state.fill
            store = self.stores[name] = Coded(codec, self.tiles, first.param.device, fill, starts)
            if state.fill == "weight":
                store.write(torch.cat([window.weight().float() for window in self.windows]), None, Key(0, 0, ""))
            self.slots[name] = sum(slots) if codec.scaled else 0
        everything = slice(0, self.tiles.numel), slice(0, self.tiles.count), slice(0, len(self.tiles.cuts))
        self.sections = [Section(*everything, self.stores, self.rest, self.tiles)]

    def weight(self, number: int) -> Tensor:
        """The fp32 weights of a parameter, flat; a copy."""
        weight = self.windows[self.members.index(number)].weight()
        if self.master is None or self.rest is None:
            return weight.float()
        return self.master.join(weight, self.rest[self.parts[number]])

    def set_weight(self, number: int, value: Tensor) -> None:
        """Give a parameter its fp32 weights; its window is to be finished afterwards."""
        weight = self.windows[self.members.index(number)].weight()
        if self.master is not None and self.rest is not None:
            value, rest = self.master.split(value, weight.dtype)
            self.rest[self.parts[number]] = rest
        weight.copy_(value)


class Units:
    """All coded states of a group: those of units, and the `owned` ones, which live with owners, by parameter, matrix and
    name."""

    def __init__(
        self,
        plan: GroupPlan,
        units: list[Unit],
        domains: Domains,
        device: torch.device,
        owned: dict[tuple[int, int, str], Coded] | None = None,
    ) -> None:
        self.plan, self.units, self.domains, self.device = plan, units, domains, device
        self.owned = owned or {}
        self.of = {number: unit for unit in units for number in unit.members}

    def holds(self, number: int, name: str) -> bool:
        """Whether this state of a parameter, as far as it is here, is stored as codes."""
        if name == MASTER:
            return number in self.of and self.of[number].rest is not None
        return (number in self.of and name in self.of[number].stores) or (number, 0, name) in self.owned

    def read(self, number: int, matrix: int | None, name: str) -> Tensor:
        """A state of a parameter, or of one of its matrices, in fp32, flat; a copy."""
        if name == MASTER:
            return self.of[number].weight(number)
        if matrix is not None:
            return self.owned[number, matrix, name].read()
        if (number, 0, name) in self.owned:
            return torch.cat([self.owned[number, m, name].read() for m in range(self._matrices(number, name))])
        store, part = self.of[number].stores[name], self.of[number].parts[number]
        spans = [s for s in store.spans if s.elements.start < part.stop and s.elements.stop > part.start]
        if not spans:
            return torch.empty(0, device=self.device)
        first = spans[0].elements.start
        return torch.cat([store.decode(span) for span in spans])[part.start - first : part.stop - first]

    def write(self, values: Values) -> None:
        """Store states (fp32); the others stay. Collective where there are cuts; then every rank of a layout stores the
        same states."""
        for (number, matrix, name), value in values.items():
            if name == MASTER:
                unit = self.of[number]
                assert unit.master is not None and unit.rest is not None
                flat, low = value.to(self.device).float().reshape(-1), unit.windows[0].param.dtype
                unit.rest[unit.parts[number]] = unit.master.split(flat.contiguous(), low)[1]
            elif matrix is not None:
                self.owned[number, matrix, name].write(value.to(self.device).float().reshape(-1), None, Key(0, 0, ""))
            elif (number, 0, name) in self.owned:
                parts = value.to(self.device).float().reshape(self._matrices(number, name), -1)
                for m, part in enumerate(parts):
                    self.owned[number, m, name].write(part, None, Key(0, 0, ""))
        found = []
        for unit in self.units:
            for name, store in unit.stores.items():
                given = {
                    number: values[number, None, name] for number in unit.members if (number, None, name) in values
                }
                if given:
                    flat = store.read()
                    for number, value in given.items():
                        flat[unit.parts[number]] = value.to(flat).reshape(-1)
                    found.append((unit, name, flat))
        agreed = self.agreed([(unit, name, unit.stores[name].cut_maxima(flat)) for unit, name, flat in found])
        for unit, name, flat in found:
            unit.stores[name].write(flat, agreed[id(unit.stores[name])], Key(0, 0, ""))

    def walk(self, sections: list[tuple[Unit, Section]], *, write: bool = True) -> Iterator[tuple[Unit, Section]]:
        """These sections in turn, to be read and, with `write`, written."""
        yield from sections

    def _matrices(self, number: int, name: str) -> int:
        return sum(key[0] == number and key[2] == name for key in self.owned)

    def agreed(self, found: list[tuple[Unit, str, Tensor]]) -> dict[int, Agreed]:
        """Maxima of cut tiles over all ranks, by store: one reduction per domain, in the same order on every rank."""
        by_domain: dict[tuple[int, ...], list[tuple[Unit, str, Tensor]]] = {}
        for item in found:
            by_domain.setdefault(item[0].domain.ranks, []).append(item)
        answers: dict[int, Agreed] = {}
        for _, items in sorted(by_domain.items()):
            stores = [(unit.stores[name], unit.slots[name], maxima) for unit, name, maxima in items]
            result = _wait(agree(items[0][0].domain, stores, self.device))
            answers |= {id(store): one for (store, _, _), one in zip(stores, result)}
        return answers


def _wait(run: Generator[dist.Work | None, None, list[Agreed]]) -> list[Agreed]:
    while True:
        try:
            work = next(run)
        except StopIteration as end:
            answer: list[Agreed] = end.value
            return answer
        if work is not None:
            work.wait()
