"""The packed exchange: pieces to whoever computes them and results back, one all-to-all each way per bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.groups import Domain


@dataclass(frozen=True, slots=True)
class Segment:
    """A rectangle of one matrix of one stack: `stacks[stack][item, r0:r1, c0:c1]`."""

    stack: int
    item: int
    r0: int
    r1: int
    c0: int
    c1: int

    @property
    def numel(self) -> int:
        """Elements that travel."""
        return (self.r1 - self.r0) * (self.c1 - self.c0)

    def view(self, stacks: list[Tensor]) -> Tensor:
        """The rectangle in these stacks."""
        return stacks[self.stack][self.item, self.r0 : self.r1, self.c0 : self.c1]


@dataclass(frozen=True)
class Exchange:
    """One bucket's routes. `pieces[peer]` are this rank's rectangles of matrices that `peer` owns, `owned[peer]` the
    rectangles of this rank's own matrices that `peer` holds; both sides list them in the same order. `travels` is False
    where, on all ranks, nothing has another peer than the rank itself."""

    domain: Domain
    pieces: list[list[Segment]]
    owned: list[list[Segment]]
    travels: bool = True

    def forward(self, sources: list[Tensor], targets: list[Tensor], like: Tensor) -> Iterator[dist.Work]:
        """Pieces to owners: from stacks of pieces into stacks of whole matrices. `like` has the dtype on the wire."""
        return self._move(sources, targets, self.pieces, self.owned, like)

    def backward(self, sources: list[Tensor], targets: list[Tensor], like: Tensor) -> Iterator[dist.Work]:
        """Owners to pieces."""
        return self._move(sources, targets, self.owned, self.pieces, like)

    def elements(self) -> tuple[int, int]:
        """(sent, received) elements of the way there; the way back is the reverse."""
        me = self.domain.me
        return tuple(  # type: ignore[return-value]
            sum(s.numel for peer, side in enumerate(sides) if peer != me for s in side)
            for sides in (self.pieces, self.owned)
        )

    def _move(
        self,
        sources: list[Tensor],
        targets: list[Tensor],
        out: list[list[Segment]],
        into: list[list[Segment]],
        like: Tensor,
    ) -> Iterator[dist.Work]:
        me = self.domain.me
        if not self.travels:
            self._stay(sources, targets, out, into)
            return
        send_sizes = [sum(s.numel for s in side) if peer != me else 0 for peer, side in enumerate(out)]
        receive_sizes = [sum(s.numel for s in side) if peer != me else 0 for peer, side in enumerate(into)]
        sent = like.new_empty(sum(send_sizes))
        received = like.new_empty(sum(receive_sizes))
        there = [s.view(sources) for peer, side in enumerate(out) if peer != me for s in side]
        if there:
            torch._foreach_copy_(_unpack(sent, there), there)
        work = self.domain.all_to_all(received, sent, receive_sizes, send_sizes)
        self._stay(sources, targets, out, into)
        if work is not None:
            yield work
        here = [s.view(targets) for peer, side in enumerate(into) if peer != me for s in side]
        if here:
            torch._foreach_copy_(here, _unpack(received, here))

    def _stay(
        self, sources: list[Tensor], targets: list[Tensor], out: list[list[Segment]], into: list[list[Segment]]
    ) -> None:
        me = self.domain.me
        if out[me]:
            torch._foreach_copy_([s.view(targets) for s in into[me]], [s.view(sources) for s in out[me]])


def _unpack(buffer: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Consecutive views of a flat buffer with the shapes of `like`."""
    parts = buffer.split([view.numel() for view in like])
    return [part.view(view.shape) for part, view in zip(parts, like, strict=True)]
