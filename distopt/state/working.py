"""Working copies: what is stored as codes, decoded from a parameter's first bucket of a step to its last."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.groups import Domain
from distopt.state.coded import Coded, agree, read_all, write_all
from distopt.state.noise import Key
from distopt.state.units import MASTER, Units
from distopt.state.windows import Window


class Working:
    """The decoded states of one step of a group, by parameter number and name; flat, and written to in place. Weights that
    are stored as they are, too, and all that is stored at the `close`, only where `ok` holds (`state.commit.put`)."""

    def __init__(self, units: Units, windows: list[Window], step: int, ok: Tensor | None = None) -> None:
        self.units, self.windows, self.step, self.ok = units, windows, step, ok
        self._flats: dict[tuple[int, str], Tensor] = {}
        self._weights: dict[int, Tensor] = {}

    def key(self, name: str) -> Key:
        """Whose random bits round a state in this step."""
        return Key(self.units.plan.storage.seed, self.step, name)

    def state(self, number: int, name: str) -> Tensor:
        """A state of a parameter, decoded when it is first asked for."""
        if (number, name) not in self._flats:
            self._flats[number, name] = self.units.read(number, None, name)
        return self._flats[number, name]

    def open(self, numbers: Iterable[int]) -> None:
        """Decode the states of these parameters at once, as far as they do not lie in pages."""
        units = {number: self.units.of[number] for number in numbers if number in self.units.of}
        coming = {
            (number, name): store
            for number, unit in units.items()
            for name, store in unit.stores.items()
            if type(store) is Coded and (number, name) not in self._flats
        }
        self._flats |= dict(zip(coming, read_all(list(coming.values()))))

    def weight(self, number: int) -> Tensor:
        """The weights of a parameter, flat: in fp32 where master weights are kept, else as they are stored."""
        unit = self.units.of.get(number)
        if unit is None or unit.master is None:
            if number not in self._weights:  # asked again, a window that is not contiguous would give another copy
                self._weights[number] = self.windows[number].weight()
            return self._weights[number]
        if (number, MASTER) not in self._flats:
            self._flats[number, MASTER] = unit.weight(number)
        return self._flats[number, MASTER]

    def close(
        self, numbers: Sequence[int], domain: Domain, device: torch.device
    ) -> Generator[dist.Work | None, None, None]:
        """Store the states of these parameters, all of `domain`; the same ones on all its ranks, as far as tiles are cut."""
        key = [(number, name) for number in numbers if number in self.units.of for name in self.units.of[number].stores]
        stores = [self.units.of[number].stores[name] for number, name in key]
        slots = [self.units.of[number].slots[name] for number, name in key]
        flats = [self.state(number, name) for number, name in key]
        found = [(store, count, store.cut_maxima(flat)) for store, count, flat in zip(stores, slots, flats)]
        agreed = yield from agree(domain, found, device)
        keys = [self.key(name) for _, name in key]
        write_all(list(zip(stores, flats, agreed, keys)), self.ok)
        for one in key:
            del self._flats[one]
        for number in numbers:
            if (number, MASTER) in self._flats:
                self.units.of[number].set_weight(number, self._flats.pop((number, MASTER)), self.ok)
