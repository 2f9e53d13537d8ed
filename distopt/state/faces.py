"""Faces: states as torch's checkpoint path can carry them.

What survives that path under FSDP2 are real DTensors, under the same key on every rank. So a state that lies as its
parameter does is a DTensor with the parameter's placements, a view of the live state. A state that lives with owners
shows a face of torch.chunk rows: `Shard(0)` wherever the parameter is sharded, filled by one exchange when a state dict
is taken and read back by the reverse one. The statistics of a split parameter are whole on every rank in a state dict.
On plain parameters states are plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from distopt.comm.exchange import Exchange, Segment
from distopt.comm.groups import Domains
from distopt.layouts import Partition, Sharded, local_tensor
from distopt.layouts.dtensor import Axis
from distopt.plan.buckets import Entry
from distopt.plan.geometry import Logical, geometry_of
from distopt.rule import State
from distopt.state.units import MASTER
from distopt.state.windows import Window

Route = tuple[Exchange, list[tuple[int, str, int]], list[Tensor], list[tuple[int, int, str]]]


class Faces:
    """The faces of one bound group (a BoundGroup or a BoundElementwise)."""

    def __init__(self, group: Any, domains: Domains) -> None:
        self.group, self.domains = group, domains
        self.rule, self.windows = group.plan.rule, group.windows

    def logical(self, number: int) -> Logical:
        """How the rule reads parameter `number`."""
        return self.group.plan.logical(number)

    def declared(self, number: int) -> dict[str, State]:
        """The states of parameter `number`; none where it has no elements. Where its matrices have several shapes, an
        owner's state is that of the first shape that has it."""
        if 0 in self.windows[number].spec.layout.shape:
            return {}
        found: dict[str, State] = {}
        for shape in self.logical(number).kinds:
            found = {**self.rule.states(shape), **found}
        mastered = self.group.plan.storage.mastered(self.windows[number].spec.itemsize)
        return {**found, MASTER: State()} if mastered else found

    def travels(self, number: int, state: State) -> bool:
        """Whether this state lives with an owner that is chosen among several ranks, or is one of several matrices that
        may differ in shape."""
        several = len(self.windows[number].spec.layout.ranks) > 1 or self.logical(number).declared
        return state.kind == "owner" and several

    def gathers(self, number: int, state: State) -> bool:
        """Whether this state is a statistic of matrices that a split has made, which no sharding of the parameter cuts
        evenly: its face is all of it, matrix after matrix, on every rank."""
        return state.kind in ("row", "col", "matrix") and self.logical(number).declared

    def here(self, number: int) -> dict[str, Tensor]:
        """Faces that are views of live states."""
        window = self.windows[number]
        found = {}
        for name, state in self.declared(number).items():
            if state.kind == "group":
                found[name] = self.group.scalar_state(name)
            elif not (
                self.travels(number, state) or self.gathers(number, state) or self.group.units.holds(number, name)
            ):
                found[name] = self._view(window, name, self.face_shape(number, name), computed=state.kind == "owner")
        return found

    def face_shape(self, number: int, name: str) -> tuple[int, ...]:
        """Shape of the whole state."""
        logical, state = self.logical(number), self.declared(number)[name]
        if state.kind == "group":
            return ()
        if state.kind == "owner":
            if logical.declared:
                return (self.owner_starts(number, name)[-1],)
            lead = logical.tensor[: logical.row_dims - 1] if logical.count != 1 or logical.row_dims > 1 else ()
            return (*lead, *state.shape)
        return logical.face(state.kind)

    def owner_starts(self, number: int, name: str) -> list[int]:
        """Where the state of each matrix begins in the whole state, flattened, and where the last one ends. A matrix may
        lack a state that others of its tensor have."""
        logical = self.logical(number)
        sizes = {
            shape: prod(states[name].shape) if name in (states := self.rule.states(shape)) else 0
            for shape in logical.kinds
        }
        return list(accumulate((sizes[shape] for shape in logical.shapes), initial=0))

    def _view(self, window: Window, name: str, face: tuple[int, ...], *, computed: bool = False) -> Tensor:
        param = window.param
        if not isinstance(param, DTensor) or isinstance(window.spec.layout, Partition):
            if name not in window.state:
                window.state[name] = torch.zeros(0, device=param.device)
            flat = window.state[name]
            whole = flat.numel() == torch.Size(face).numel()
            return flat.view(face) if whole and getattr(param, "_distopt_flat", None) is None else flat
        if computed:  # from a matrix that this rank has all of
            return _dtensor(window.state[name].view(face), param, [Replicate()] * param.device_mesh.ndim, face)
        shape = tuple(param.shape)
        reduced = [n != full for n, full in zip(face, shape, strict=True)]
        local = [1 if less else n for n, less in zip(param._local_tensor.shape, reduced, strict=True)]
        if param._local_tensor.numel() == 0:
            local = [n if not less else 1 for n, less in zip(param._local_tensor.shape, reduced, strict=True)]
        size = torch.Size(local).numel()
        if name not in window.state or window.state[name].numel() != size:
            window.state[name] = torch.zeros(size, device=param._local_tensor.device)
        placements = [
            Replicate() if isinstance(p, Shard | _StridedShard) and reduced[p.dim] else p for p in param.placements
        ]
        return _dtensor(window.state[name].view(local), param, placements, face)

    def face(self, number: int, name: str) -> Tensor:
        """A state that is stored as codes where its parameter lies, in fp32; a snapshot."""
        value = self.group.units.read(number, None, name)
        return self._whole_face(number, name, value)

    def parameter(self, number: int) -> Tensor:
        """The face of a parameter itself, in fp32."""
        return self._whole_face(number, MASTER, self.windows[number].weight().float())

    def is_coded_here(self, number: int, name: str) -> bool:
        """Whether this rank stores its part of a state as codes, and lies where the parameter does."""
        return self.group.units.holds(number, name) and not self.travels(number, self.declared(number)[name])

    def _whole_face(self, number: int, name: str, flat: Tensor | None) -> Tensor:
        """The face of a coded state that lies where the parameter does, whole or as the parameter is cut; None: without
        values."""
        window, shape, state = self.windows[number], self.face_shape(number, name), self.declared(number)[name]
        param = window.param
        if flat is None:
            flat = torch.empty(prod(shape) if state.kind == "owner" else window.numel, device="meta")
        if isinstance(param, DTensor) and not isinstance(window.spec.layout, Partition):
            local = shape if state.kind == "owner" else param._local_tensor.shape
            return _dtensor(flat.view(local), param, list(param.placements), shape)
        return flat.view(shape) if flat.numel() == prod(shape) and not hasattr(param, "_distopt_flat") else flat

    def placeholders(self, number: int) -> dict[str, Tensor]:
        """Faces without values of the states that have to be brought together or are stored as codes: torch asks which
        states there are, and whoever reads one outside of a state dict gets an error and not something stale."""
        found = {}
        for name, state in self.declared(number).items():
            if self.travels(number, state):
                local = self.face_layout(number, name).local_shape(self.windows[number].spec.index)
                found[name] = self._as_face(number, name, torch.empty(local, device="meta"))
            elif self.gathers(number, state):
                found[name] = self._as_face(number, name, torch.empty(self.face_shape(number, name), device="meta"))
            elif self.group.units.holds(number, name):
                found[name] = self._whole_face(number, name, None)
        return found

    def fill(self) -> dict[int, dict[str, Tensor]]:
        """Collective: faces of the states that have to be brought together or are stored as codes, by parameter number; a
        snapshot. Statistics that a rank with an empty shard has no part in computing are completed on it."""
        self._complete_statistics()
        found: dict[int, dict[str, Tensor]] = {}
        for number, name, value in self._gathered():
            found.setdefault(number, {})[name] = self._as_face(number, name, value)
        like = torch.empty(0, device=self.group.device)
        for exchange, locals_, owned, _ in self._travelling():
            faces = [torch.zeros((1, 1, numel), device=self.group.device) for _, _, numel in locals_]
            for work in exchange.backward(owned, faces, like):
                work.wait()
            for (number, name, _), face in zip(locals_, faces):
                found.setdefault(number, {})[name] = self._as_face(number, name, face)
        for number in range(len(self.windows)):
            for name in self.declared(number):
                if self.is_coded_here(number, name):
                    found.setdefault(number, {})[name] = self.face(number, name)
        return found

    def _gathered(self) -> Iterator[tuple[int, str, Tensor]]:
        """Collective: the statistics of split parameters, whole, one sum per domain in which every element comes from the
        first rank that has it."""
        wanted: dict[tuple[int, ...], list[tuple[int, str, State]]] = {}
        for number, window in enumerate(self.windows):
            for name, state in self.declared(number).items():
                if self.gathers(number, state):
                    wanted.setdefault(tuple(sorted(window.spec.layout.ranks)), []).append((number, name, state))
        for ranks, members in sorted(wanted.items()):
            sizes = [self.face_shape(number, name)[0] for number, name, _ in members]
            sums = torch.zeros(sum(sizes), device=self.group.device)
            parts = sums.split(sizes)
            for (number, name, state), part in zip(members, parts):
                for start, view, first in self._statistics(number, name, state):
                    if first:
                        part[start : start + len(view)] = view
            work = self.domains[ranks].all_reduce(sums)
            if work is not None:
                work.wait()
            yield from ((number, name, part) for (number, name, _), part in zip(members, parts))

    def _statistics(self, number: int, name: str, state: State) -> Iterator[tuple[int, Tensor, bool]]:
        """The runs of a statistic that lie here: where each begins in the whole of it, a view of its values, and whether
        this is the first place that has it."""
        window, logical = self.windows[number], self.logical(number)
        starts = logical.starts(state.kind)
        runs = geometry_of(window.spec.layout, logical).statistics(window.spec.index, state.kind)
        for matrix, start, stop, at, first in runs:
            yield starts[matrix] + start, window.state[name][at : at + stop - start], first

    def is_collective(self) -> bool:
        """Whether `fill` needs other ranks."""
        gathered = (self.gathers(n, s) for n in range(len(self.windows)) for s in self.declared(n).values())
        alone = all(len(ranks) == 1 for ranks in self.group.plan.homes)
        return (not alone and any(True for _ in self._travelling())) or any(gathered) or bool(self._incomplete())

    def _incomplete(self) -> dict[tuple[int, ...], list[tuple[Window, str, tuple[int, ...]]]]:
        """By domain: the statistics that a rank with an empty shard lacks, with the shapes of their faces."""
        wanting: dict[tuple[int, ...], list[tuple[Window, str, tuple[int, ...]]]] = {}
        for number, window in enumerate(self.windows):
            layout = window.spec.layout
            # Chunks only shrink, so the last shard is empty if any is.
            if not isinstance(layout, Sharded) or 0 not in layout.local_shape(len(layout.ranks) - 1):
                continue
            for name, state in self.declared(number).items():
                if state.kind in ("row", "col", "matrix") and not self.gathers(number, state):
                    face = self.face_shape(number, name)
                    wanting.setdefault(tuple(sorted(layout.ranks)), []).append((window, name, face))
        return wanting

    def _complete_statistics(self) -> None:
        """A row or column statistic of a DTensor is `Replicate` along the axes that it was reduced over, but a rank whose
        shard is empty never computed it. torch's checkpoint lets any replica speak for all, so give it the values: one
        sum per domain, in which every element comes from the first rank that has it (first chunks are never empty)."""
        for ranks, members in sorted(self._incomplete().items()):
            sums = torch.zeros(sum(prod(face) for _, _, face in members), device=self.group.device)
            views = []
            for (window, name, face), flat in zip(members, sums.split([prod(face) for _, _, face in members])):
                layout, index = window.spec.layout, window.spec.index
                assert isinstance(layout, Sharded)
                boxes = [self._face_box(layout, i, face) for i in range(len(layout.ranks))]
                view = flat.view(face)[tuple(slice(a, b) for a, b in boxes[index])]
                views.append(view)
                if boxes.index(boxes[index]) == index:
                    view.copy_(window.state[name].view(view.shape))
            work = self.domains[ranks].all_reduce(sums)
            assert work is not None
            work.wait()
            for (window, name, _), view in zip(members, views):
                window.state[name].copy_(view.reshape(-1))

    def _face_box(self, layout: Sharded, index: int, face: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Where a rank's part of a statistic lies in the whole of it."""
        return tuple(
            (0, 1) if size != full else interval for interval, size, full in zip(layout.box(index), face, layout.shape)
        )

    def read(self, values: dict[int, dict[str, Tensor]]) -> None:
        """Collective: hand local faces (any shape) back to where states live. What is not among the values
        stays as it is."""
        units = self.group.units
        named = ((number, name, value) for number, found in values.items() for name, value in found.items())
        units.write({(number, None, name): value for number, name, value in named if self.is_coded_here(number, name)})
        for number, found in values.items():
            for name, state in self.declared(number).items():
                if name in found and self.gathers(number, state):
                    for start, view, _ in self._statistics(number, name, state):
                        view.copy_(found[name][start : start + len(view)])
        routes = list(self._travelling())
        wanted = {(number, name) for _, locals_, _, _ in routes for number, name, _ in locals_}
        live = self.fill() if any(name not in values.get(number, {}) for number, name in wanted) else {}
        like = torch.empty(0, device=self.group.device)
        for exchange, locals_, owned, keys in routes:
            sources = []
            for number, name, _ in locals_:
                found = values.get(number, {})
                value = found[name] if name in found else local_tensor(live[number][name])
                sources.append(value.to(like).reshape(1, 1, -1))
            for work in exchange.forward(sources, owned, like):
                work.wait()
            units.write({key: value for key, value in zip(keys, owned) if key in units.owned})

    def _as_face(self, number: int, name: str, face: Tensor) -> Tensor:
        window = self.windows[number]
        shape = self.face_shape(number, name)
        if not isinstance(window.param, DTensor):
            return face.view(-1)
        if self.gathers(number, self.declared(number)[name]):
            return _dtensor(face, window.param, [Replicate()] * len(window.param.placements), shape)
        placements = [Shard(0) if isinstance(p, Shard | _StridedShard) else p for p in window.param.placements]
        return _dtensor(face.view(-1, *shape[1:]), window.param, placements, shape)

    def face_layout(self, number: int, name: str) -> Sharded:
        """The first dim of a state that lives with owners, dealt out as torch.chunk does over the ranks that hold the
        parameter."""
        layout = self.windows[number].spec.layout
        axes = layout.axes if isinstance(layout, Sharded) else (Axis(len(layout.ranks), 0),)
        return Sharded(self.face_shape(number, name), layout.ranks, tuple(Axis(axis.size, 0) for axis in axes))

    def _travelling(self) -> Iterator[Route]:
        """Per domain and state name: the routes between owners and faces, (parameter, name, elements) of each local face,
        the owned matrices, flat (1, 1, elements), and whose they are: parameter, matrix, name."""
        for ranks, entries in sorted(self.group.plan.homes.items()):
            states = {param: self.declared(param) for param in {entry.param for entry in entries}}
            names = {n for param, found in states.items() for n, state in found.items() if self.travels(param, state)}
            for name in sorted(names):
                yield self._route(self.domains[ranks], [e for e in entries if name in states[e.param]], name)

    def _route(self, domain: Any, entries: list[Entry], name: str) -> Route:
        pieces: list[list[Segment]] = [[] for _ in range(domain.size)]
        owned: list[list[Segment]] = [[] for _ in range(domain.size)]
        locals_: list[tuple[int, str, int]] = []
        position: dict[int, int] = {}
        tensors: list[Tensor] = []
        keys: list[tuple[int, int, str]] = []
        starts: dict[int, list[int]] = {}
        chunks: dict[int, list[tuple[int, int]]] = {}
        for entry in entries:
            param, index = entry.param, self.windows[entry.param].spec.index
            layout = self.windows[param].spec.layout
            if param not in position:
                position[param] = len(locals_)
                starts[param], chunks[param] = self.owner_starts(param, name), self._chunks(param, name)
                locals_.append((param, name, chunks[param][index][1] - chunks[param][index][0]))
            first, last = starts[param][entry.matrix : entry.matrix + 2]
            for i, (low, high) in enumerate(chunks[param]):
                a, b = max(first, low), min(last, high)
                if a >= b:
                    continue
                if i == index:
                    pieces[entry.owner].append(Segment(position[param], 0, 0, 1, a - low, b - low))  # type: ignore[index]
                if entry.owner == domain.me:
                    peer = domain.ranks.index(layout.ranks[i])
                    owned[peer].append(Segment(len(tensors), 0, 0, 1, a - first, b - first))
            if entry.owner == domain.me and first < last:
                tensors.append(self.group.owner_state(param, entry.matrix, name).view(1, 1, -1))
                keys.append((param, entry.matrix, name))
        return Exchange(domain, pieces, owned), locals_, tensors, keys

    def _chunks(self, number: int, name: str) -> list[tuple[int, int]]:
        """The elements of a whole state, flattened, that each rank's face has."""
        layout = self.face_layout(number, name)
        inner = prod(layout.shape[1:])
        boxes = (layout.box(index)[0] for index in range(len(layout.ranks)))
        return [(low * inner, high * inner) for low, high in boxes]


def _dtensor(local: Tensor, param: DTensor, placements: list[Any], shape: tuple[int, ...]) -> DTensor:
    size = torch.Size(shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, param.device_mesh, placements, run_check=False, shape=size, stride=stride)
