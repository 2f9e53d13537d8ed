"""Faces: states as torch's checkpoint path can carry them.

What survives that path under FSDP2 are real DTensors, under the same key on every rank. So a state that lies as its
parameter does is a DTensor with the parameter's placements, a view of the live state. A state that lives with owners
shows a face of torch.chunk rows: `Shard(0)` wherever the parameter is sharded, filled by one exchange when a state dict
is taken and read back by the reverse one. On plain parameters states are plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from distopt.plan.build import Entry
from distopt.plan.geometry import Geometry, Logical, geometry_of, logical_of
from distopt.rule import Shape, State
from distopt.state.windows import Window


class Faces:
    """The faces of one bound group (a BoundGroup or a BoundElementwise)."""

    def __init__(self, group: Any, domains: Domains) -> None:
        self.group, self.domains = group, domains
        self.rule, self.windows = group.plan.rule, group.windows

    def logical(self, number: int) -> Logical:
        """How the rule reads parameter `number`."""
        return logical_of(self.windows[number].spec.layout.shape, flatten=self.rule.reach == "matrix")

    def declared(self, number: int) -> dict[str, State]:
        """The states of parameter `number`; none where it has no elements."""
        if 0 in self.windows[number].spec.layout.shape:
            return {}
        return self.rule.states(self.logical(number).shape)

    def travels(self, number: int, state: State) -> bool:
        """Whether this state lives with an owner that is chosen among several ranks."""
        return state.kind == "owner" and len(self.windows[number].spec.layout.ranks) > 1

    def here(self, number: int) -> dict[str, Tensor]:
        """Faces that are views of live states."""
        window = self.windows[number]
        found = {}
        for name, state in self.declared(number).items():
            if state.kind == "group":
                found[name] = self.group.scalar_state(name)
            elif not self.travels(number, state) and not self.group.units.holds(number, name):
                found[name] = self._view(window, name, self.face_shape(number, state))
        return found

    def face_shape(self, number: int, state: State) -> tuple[int, ...]:
        """Shape of the whole state."""
        logical = self.logical(number)
        if state.kind == "owner":
            lead = logical.tensor[: logical.row_dims - 1] if logical.count != 1 or logical.row_dims > 1 else ()
            return (*lead, *state.shape)
        return logical.face(state.kind)

    def _view(self, window: Window, name: str, face: tuple[int, ...]) -> Tensor:
        param = window.param
        if not isinstance(param, DTensor) or isinstance(window.spec.layout, Partition):
            if name not in window.state:
                window.state[name] = torch.zeros(0, device=param.device)
            flat = window.state[name]
            whole = flat.numel() == torch.Size(face).numel()
            return flat.view(face) if whole and not hasattr(param, "_distopt_flat") else flat
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

    def _like(self, window: Window, flat: Tensor) -> Tensor:
        """The face of a state that lies as the parameter does."""
        param, shape = window.param, window.spec.layout.shape
        if isinstance(param, DTensor) and not isinstance(window.spec.layout, Partition):
            return _dtensor(flat.view(param._local_tensor.shape), param, list(param.placements), shape)
        return flat.view(shape) if flat.numel() == prod(shape) and not hasattr(param, "_distopt_flat") else flat

    def placeholders(self, number: int) -> dict[str, Tensor]:
        """Faces without values of the states that live with owners or are stored as codes: torch asks which states there are,
        and whoever reads one outside of a state dict gets an error and not something stale."""
        found = {}
        for name, state in self.declared(number).items():
            if self.travels(number, state):
                layout = self.face_geometry(number, name).layout
                assert isinstance(layout, Sharded)
                local = layout.local_shape(self.windows[number].spec.index)
                found[name] = self._as_face(number, name, torch.empty(local, device="meta"))
            elif self.group.units.holds(number, name):
                window = self.windows[number]
                found[name] = self._like(window, torch.empty(window.numel, device="meta"))
        return found

    def fill(self) -> dict[int, dict[str, Tensor]]:
        """Collective: faces of the states that live with owners or are stored as codes, by parameter number; a
        snapshot. Statistics that a rank with an empty shard has no part in computing are completed on it."""
        self._complete_statistics()
        found: dict[int, dict[str, Tensor]] = {}
        for exchange, locals_, owned in self._travelling():
            faces = [torch.zeros((1, rows, cols), device=self.group.device) for _, _, rows, cols in locals_]
            like = torch.empty(0, device=self.group.device)
            for work in exchange.backward(owned, faces, like):
                work.wait()
            for (number, name, _, _), face in zip(locals_, faces):
                found.setdefault(number, {})[name] = self._as_face(number, name, face)
        for number, window in enumerate(self.windows):
            for name in self.declared(number):
                if self.group.units.holds(number, name):
                    value = self.group.units.read(number, name)
                    found.setdefault(number, {})[name] = self._like(window, value)
        return found

    def _complete_statistics(self) -> None:
        """A row or column statistic of a DTensor is `Replicate` along the axes that it was reduced over, but a rank whose
        shard is empty never computed it. torch's checkpoint lets any replica speak for all, so give it the values: one
        sum per domain, in which every element comes from the first rank that has it (first chunks are never empty)."""
        wanting: dict[tuple[int, ...], list[tuple[Window, str, tuple[int, ...]]]] = {}
        for number, window in enumerate(self.windows):
            layout = window.spec.layout
            # Chunks only shrink, so the last shard is empty if any is.
            if not isinstance(layout, Sharded) or 0 not in layout.local_shape(len(layout.ranks) - 1):
                continue
            for name, state in self.declared(number).items():
                if state.kind in ("row", "col", "matrix"):
                    face = self.face_shape(number, state)
                    wanting.setdefault(tuple(sorted(layout.ranks)), []).append((window, name, face))
        for ranks, members in sorted(wanting.items()):
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
        """Collective: hand local faces (any shape) back to the owners and the stores of codes. What is not among the values
        stays as it is."""
        units = self.group.units
        named = ((number, name, value) for number, found in values.items() for name, value in found.items())
        units.write({(number, name): value for number, name, value in named if units.holds(number, name)})
        routes = list(self._travelling())
        wanted = {(number, name) for _, locals_, _ in routes for number, name, _, _ in locals_}
        live = self.fill() if any(name not in values.get(number, {}) for number, name in wanted) else {}
        like = torch.empty(0, device=self.group.device)
        for exchange, locals_, owned in routes:
            sources = []
            for number, name, rows, cols in locals_:
                found = values.get(number, {})
                value = found[name] if name in found else local_tensor(live[number][name])
                sources.append(value.to(like).reshape(1, rows, cols))
            for work in exchange.forward(sources, owned, like):
                work.wait()

    def _as_face(self, number: int, name: str, face: Tensor) -> Tensor:
        window = self.windows[number]
        shape = self.face_shape(number, self.declared(number)[name])
        if not isinstance(window.param, DTensor):
            return face.view(-1)
        placements = [Shard(0) if isinstance(p, Shard | _StridedShard) else p for p in window.param.placements]
        cols = shape[-1]
        local = face.view(-1, *shape[1:-1], cols) if len(shape) > 2 else face.view(-1, cols)
        return _dtensor(local, window.param, placements, shape)

    def face_geometry(self, number: int, name: str) -> Geometry:
        """Rows of the whole state, dealt out as torch.chunk does over the ranks that hold the parameter."""
        layout = self.windows[number].spec.layout
        state = self.declared(number)[name]
        shape = self.face_shape(number, state)
        axes = layout.axes if isinstance(layout, Sharded) else (Axis(len(layout.ranks), 0),)
        rows = tuple(Axis(axis.size, 0) for axis in axes)
        logical = Logical(shape, len(shape) - 1, Shape(*state.shape, len(shape)))
        return geometry_of(Sharded(shape, layout.ranks, rows), logical)

    def _travelling(self) -> Iterator[tuple[Exchange, list[tuple[int, str, int, int]], list[Tensor]]]:
        """Per domain and state name: the routes between owners and faces, (parameter, name, rows, cols) of each local
        face, and the owned matrices (1, rows, cols)."""
        for ranks, entries in sorted(self.group.plan.homes.items()):
            domain = self.domains[ranks]
            if domain.size == 1 or not entries:
                continue
            names = sorted(
                {name for e in entries for name, state in self.declared(e.param).items() if state.kind == "owner"}
            )
            for name in names:
                yield self._route(domain, entries, name)

    def _route(
        self, domain: Any, entries: list[Entry], name: str
    ) -> tuple[Exchange, list[tuple[int, str, int, int]], list[Tensor]]:
        pieces: list[list[Segment]] = [[] for _ in range(domain.size)]
        owned: list[list[Segment]] = [[] for _ in range(domain.size)]
        locals_: list[tuple[int, str, int, int]] = []
        position: dict[int, int] = {}
        tensors: list[Tensor] = []
        for entry in entries:
            if name not in self.declared(entry.param):
                continue
            geometry = self.face_geometry(entry.param, name)
            index = self.windows[entry.param].spec.index
            if entry.param not in position:
                position[entry.param] = len(locals_)
                rects = geometry.layout.rects(index, geometry.logical.row_dims)
                rows = sum(rect.r1 - rect.r0 for rect in rects)
                locals_.append((entry.param, name, rows, geometry.logical.shape.cols))
            for rect in geometry.pieces_of(index, entry.matrix):
                first = rect.offset // rect.stride
                part = Segment(position[entry.param], 0, first, first + rect.r1 - rect.r0, rect.c0, rect.c1)
                pieces[entry.owner].append(part)  # type: ignore[index]
            if entry.owner == domain.me:
                for i, rank in enumerate(geometry.layout.ranks):
                    for rect in geometry.pieces_of(i, entry.matrix):
                        part = Segment(len(tensors), 0, rect.r0, rect.r1, rect.c0, rect.c1)
                        owned[domain.ranks.index(rank)].append(part)
                tensors.append(self.group.owner_state(entry.param, entry.matrix, name)[None])
        return Exchange(domain, pieces, owned), locals_, tensors


def _dtensor(local: Tensor, param: DTensor, placements: list[Any], shape: tuple[int, ...]) -> DTensor:
    size = torch.Size(shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, param.device_mesh, placements, run_check=False, shape=size, stride=stride)
