"""Units: parameters whose states are stored as codes, one by one or small ones together, and how they are read."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.groups import Domain, Domains
from distopt.kernels import state_kernels
from distopt.plan.buckets import GroupPlan
from distopt.plan.tiles import join_tiles, local_tiles, shared_tiles, tile_starts
from distopt.rule import State
from distopt.state.allocation import allocate
from distopt.state.codecs import FP32, Codec
from distopt.state.coded import Agreed, Coded, agree
from distopt.state.commit import put
from distopt.state.master import Master
from distopt.state.noise import Key
from distopt.state.pages.pager import Pager
from distopt.state.sections import MASTER, Paged, Section, paged_sections, whole
from distopt.state.windows import Window

__all__ = ["MASTER", "Section", "Unit", "Units"]

Values = dict[tuple[int, int | None, str], Tensor]
"""By parameter number, matrix (None: of the whole parameter) and name."""


class Unit:
    """Parameters of one domain whose coded states lie in common stores, in order.

    Attributes:
        members: their numbers in the group.
        hosted: whether it is stepped on the host.
        parts, tile_parts: where each lies among the unit's elements, and its tiles among the unit's.
        stores: by state name.
        sections: what the stores hold, cut into runs of elements; of elementwise rules.
        master, rest: how what parameters of lower precision lack of fp32 weights is kept, and that; or None.
    """

    def __init__(
        self,
        plan: GroupPlan,
        windows: list[Window],
        members: list[int],
        states: Mapping[str, State],
        domain: Domain,
        pager: Pager | None = None,
    ) -> None:
        self.members, self.domain, self.hosted = members, domain, members[0] in plan.hosted
        self.windows = [windows[i] for i in members]
        sizes = [window.numel for window in self.windows]
        self.parts = {i: slice(a, b) for i, (a, b) in zip(members, pairwise(accumulate(sizes, initial=0)))}
        self.stores: dict[str, Coded | Paged] = {}
        self.slots: dict[str, int] = {}
        specs = [window.spec for window in self.windows]
        first, device = self.windows[0], self.windows[0].param.device
        slots = [len(shared_tiles(spec.layout)) for spec in specs]
        tiles = [local_tiles(spec.layout, spec.index) for spec in specs]
        self.tiles = join_tiles(tiles, slots)
        edges = pairwise(accumulate((part.count for part in tiles), initial=0))
        self.tile_parts = {i: slice(a, b) for i, (a, b) in zip(members, edges)}
        self.master: Master | None = plan.storage.master if plan.storage.mastered(first.spec.itemsize) else None
        self.rest: Tensor | Paged | None = None
        shape = first.spec.layout.shape
        codecs: dict[str, Codec] = {n: plan.storage.codec(n, state, shape) or FP32() for n, state in states.items()}
        fills = {name: float(state.fill) for name, state in states.items() if state.fill != "weight"}
        starts = None
        if any(codec.stochastic for codec in codecs.values()):
            firsts = list(accumulate((prod(spec.layout.shape) for spec in plan.specs), initial=0))
            starts = np.concatenate([tile_starts(s.layout, s.index) + firsts[i] for s, i in zip(specs, members)])
        self.sections: list[Section] = []
        if plan.pages:
            assert pager is not None
            kept: dict[str, Any] = {**codecs, **({MASTER: self.master} if self.master is not None else {})}
            for key, names in [("", list(kept))] if plan.elementwise else [(name, [name]) for name in kept]:
                pages = plan.pages[members[0], None, key]
                together = {name: kept[name] for name in names}
                home = torch.device("cpu") if self.hosted else device
                self.sections = paged_sections(pager, pages, together, fills, self.tiles, home, starts)
                faces = {name: Paged(name, self.sections, kept[name], self.tiles, device) for name in names}
                self.rest = faces.pop(MASTER, self.rest)
                self.stores |= faces
        else:
            stores = {n: Coded(c, self.tiles, device, fills.get(n, 0.0), starts) for n, c in codecs.items()}
            self.stores |= stores
            if self.master is not None:
                self.rest = allocate(self.tiles.numel, self.master.dtype, device).zero_()
            self.sections = [whole(self.tiles, stores, self.rest, device)]
        if self.master is not None and self.rest is not None:
            weights = torch.cat([window.weight() for window in self.windows])
            self.rest[0 : self.tiles.numel] = self.master.split(weights.float(), weights.dtype)[1]
        for name, state in states.items():
            if state.fill == "weight":
                weights = torch.cat([window.weight().float() for window in self.windows])
                self.stores[name].write(weights, None, Key(0, 0, ""))
            self.slots[name] = sum(slots) if codecs[name].scaled else 0

    def weight(self, number: int) -> Tensor:
        """The fp32 weights of a parameter, flat; a copy."""
        weight = self.windows[self.members.index(number)].weight()
        if self.master is None or self.rest is None:
            return weight.float()
        rest, kernels = self.rest[self.parts[number]], state_kernels(weight.device)
        return self.master.join(weight, rest) if kernels is None else kernels.join(weight, rest)

    def set_weight(self, number: int, value: Tensor, ok: Tensor | None = None) -> None:
        """Give a parameter its fp32 weights; its window is to be finished afterwards. See `put` for `ok`."""
        weight = self.windows[self.members.index(number)].weight()
        if self.master is not None and self.rest is not None:
            part, kernels = self.parts[number], state_kernels(weight.device)
            if kernels is not None and isinstance(self.rest, Tensor):
                kernels.split(value, weight, self.rest[part], ok)
                torch.autograd.graph.increment_version(weight)  # the kernel writes to an address
                return
            value, rest = self.master.split(value, weight.dtype)
            self.rest[part] = rest if ok is None else torch.where(ok, rest, self.rest[part])
        put(weight, value, ok)


class Units:
    """All coded states of a group: those of units, and the `owned` ones, which live with owners, by parameter, matrix and
    name."""

    def __init__(
        self,
        plan: GroupPlan,
        units: list[Unit],
        domains: Domains,
        device: torch.device,
        owned: Mapping[tuple[int, int, str], Coded | Paged] | None = None,
        pager: Pager | None = None,
    ) -> None:
        self.plan, self.units, self.domains, self.device, self.pager = plan, units, domains, device, pager
        self.owned = owned or {}
        self.allowed: frozenset[Any] | None = None  # compiled kernels that all ranks have; None: nobody else to ask
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
        return self.of[number].stores[name].run(self.of[number].parts[number])

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
        agreed = self.agreed(
            [(unit, name, unit.stores[name].cut_maxima(flat)) for unit, name, flat in found if unit.slots[name]]
        )
        for unit, name, flat in found:
            unit.stores[name].write(flat, agreed.get(id(unit.stores[name])), Key(0, 0, ""))

    def walk(self, sections: list[tuple[Unit, Section]], *, write: bool = True) -> Iterator[tuple[Unit, Section]]:
        """These sections in turn, to be read and, with `write`, written. Those to come are fetched meanwhile."""
        if self.pager is not None:
            self.pager.expect(section.page for _, section in sections if section.page is not None)
        for unit, section in sections:
            with section.opened(write=write):
                yield unit, section

    def expect(self, keys: list[tuple[int, int | None, str]]) -> None:
        """Fetch ahead the states of these parameters and matrices, which are read next, in this order."""
        if self.pager is not None:
            self.pager.expect(page for key in keys for page in self.plan.pages.get(key, ()))

    def alarm(self) -> str | None:
        """Why no step can be taken, if so."""
        return None if self.pager is None else self.pager.alarm()

    def _matrices(self, number: int, name: str) -> int:
        return sum(key[0] == number and key[2] == name for key in self.owned)

    def agreed(self, found: list[tuple[Unit, str, Tensor]]) -> dict[int, Agreed]:
        """Maxima of cut tiles over all ranks, by store, where there are any: one reduction per domain, in the same order on
        every rank."""
        by_domain: dict[tuple[int, ...], list[tuple[Unit, str, Tensor]]] = {}
        for item in found:
            by_domain.setdefault(item[0].domain.ranks, []).append(item)
        answers: dict[int, Agreed] = {}
        for _, items in sorted(by_domain.items()):
            stores = [(unit.stores[name], unit.slots[name], maxima) for unit, name, maxima in items]
            result = _wait(agree(items[0][0].domain, stores, self.device))
            answers |= {id(store): one for (store, _, _), one in zip(stores, result) if one is not None}
        return answers


def _wait(run: Generator[dist.Work | None, None, list[Agreed | None]]) -> list[Agreed | None]:
    while True:
        try:
            work = next(run)
        except StopIteration as end:
            answer: list[Agreed | None] = end.value
            return answer
        if work is not None:
            work.wait()
