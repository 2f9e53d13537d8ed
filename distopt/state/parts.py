"""Parts of tensors and states: the rectangles of a logical tensor that lie on this rank, for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from distopt.layouts import local_tensor
from distopt.layouts.base import Layout
from distopt.plan.geometry import geometry_of
from distopt.rule import State
from distopt.state.faces import Faces

Rectangle = tuple[int, int, int, int]


class Part:
    """One local rectangle of a logical tensor: how to save it and where to load it to. Of a state that is stored as codes
    (`coded`: its faces, parameter number, matrix and name), `tensor` is a view on the meta device of what it decodes to."""

    def __init__(
        self, name: str, shape: tuple[int, ...], rect: Rectangle, tensor: Tensor, *, saves: bool = True
    ) -> None:
        self.name, self.shape, self.rect, self.tensor, self.saves = name, shape, rect, tensor, saves
        self.copies_back: tuple[Tensor, Tensor] | None = None
        self.coded: tuple[Faces, tuple[int, int | None, str]] | None = None

    def value(self) -> Tensor:
        """What there is to save."""
        if self.coded is None:
            return self.tensor
        faces, key = self.coded
        return self.within(faces.group.units.read(*key))

    def within(self, flat: Tensor) -> Tensor:
        """The rectangle of the whole decoded state."""
        offset = flat.storage_offset() + self.tensor.storage_offset()
        return flat.as_strided(self.tensor.shape, self.tensor.stride(), offset)


def tensor_parts(name: str, tensor: Tensor, layout: Layout, rank: int) -> Iterator[Part]:
    """What lies here of a parameter or buffer; one empty part where that is nothing."""
    local = local_tensor(tensor)
    staged = local.contiguous()  # itself, unless its storage is laid out otherwise (channels_last)
    index = layout.ranks.index(rank)
    rects = layout.rects(index, max(len(layout.shape) - 1, 0))
    flat = staged.view(-1)
    for rect in rects:
        view = _strided(flat, rect.r1 - rect.r0, rect.c1 - rect.c0, rect.stride, rect.offset)
        part = Part(name, layout.shape, (rect.r0, rect.r1, rect.c0, rect.c1), view, saves=is_primary(tensor))
        part.copies_back = None if local.is_contiguous() else (local, staged)
        yield part
    if not rects:
        yield Part(name, layout.shape, (0, 0, 0, 0), flat[:0].view(0, 0), saves=is_primary(tensor))


def state_parts(name: str, key: str, state: State, number: int, faces: Faces) -> Iterator[Part]:
    """What lies here of state `key` of parameter `number`, of any kind, decoded; one empty part tells of its shape."""
    window = faces.windows[number]
    layout, index = window.spec.layout, window.spec.index
    logical = faces.logical(number)
    if state.kind == "group":
        yield Part(name, (), (0, 1, 0, 1), faces.group.scalar_state(key).view(1, 1))
        return
    if state.kind == "like":
        coded = (faces, (number, None, key)) if faces.group.units.holds(number, key) else None
        flat = torch.empty(window.numel, device="meta") if coded else window.state.get(key)
        rects = layout.rects(index, max(len(layout.shape) - 1, 0))
        for rect in rects:
            assert flat is not None
            view = _strided(flat, rect.r1 - rect.r0, rect.c1 - rect.c0, rect.stride, rect.offset)
            part = Part(name, layout.shape, (rect.r0, rect.r1, rect.c0, rect.c1), view)
            part.coded = coded
            yield part
        if not rects:
            part = Part(name, layout.shape, (0, 0, 0, 0), torch.empty((0, 0), device="meta" if coded else "cpu"))
            part.coded = coded
            yield part
        return
    if state.kind == "owner":
        starts = faces.owner_starts(number, key)
        rows, cols = state.shape
        whole: tuple[int, ...] = (starts[-1],) if logical.declared else (logical.count * rows, cols)
        yield Part(name, whole, (0, 0, 0, 0), torch.empty((0, 0)))
        for matrix in range(logical.count):
            here = (number, matrix, key)
            store = faces.group.units.owned.get(here)
            tensor = torch.empty(store.shape, device="meta") if store else faces.group.find_owner_state(*here)
            if tensor is not None:
                if logical.declared:  # shapes differ: one after the other, flat
                    part = Part(name, whole, (0, 1, starts[matrix], starts[matrix + 1]), tensor.view(1, -1))
                else:
                    part = Part(name, whole, (matrix * rows, (matrix + 1) * rows, 0, cols), tensor)
                part.coded = (faces, here) if store else None
                yield part
        return
    starts = logical.starts(state.kind)
    upright = state.kind != "col" and not logical.declared
    whole = (starts[-1], 1) if upright else (starts[-1],) if logical.declared else (logical.count, starts[1])
    yield Part(name, whole, (0, 0, 0, 0), torch.empty((0, 0)))
    for matrix, a, b, at, saves in geometry_of(layout, logical).statistics(index, state.kind):
        flat, first = window.state[key][at : at + b - a], starts[matrix]
        if upright:
            yield Part(name, whole, (first + a, first + b, 0, 1), flat.view(-1, 1), saves=saves)
        elif logical.declared:
            yield Part(name, whole, (0, 1, first + a, first + b), flat.view(1, -1), saves=saves)
        else:
            yield Part(name, whole, (matrix, matrix + 1, a, b), flat.view(1, -1), saves=saves)


def _strided(flat: Tensor, rows: int, cols: int, stride: int, offset: int) -> Tensor:
    return flat.as_strided((rows, cols), (stride, 1), flat.storage_offset() + offset)


def is_primary(tensor: Tensor) -> bool:
    """Whether this rank's copy of a replicated DTensor is the one to save."""
    if not isinstance(tensor, DTensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate() or ()
    return all(c == 0 for c, p in zip(coordinate, tensor.placements) if isinstance(p, Replicate))
