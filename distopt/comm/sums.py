"""Sums over the homes of each matrix: of many matrices, each with other homes, in one or two all-to-alls.

Sub-groups need no process groups of their own this way, and every home gets the same bits: a sum is made in the order of
the homes, of all of it by each (few elements, or two homes), or of one part by each, which then tells the others.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.groups import Domain
from distopt.plan.strategies import Payload


@dataclass(frozen=True)
class Sums:
    """The matrices of one bucket: `homes[i]` are the positions of the ranks with a slice of matrix i."""

    domain: Domain
    homes: Sequence[tuple[int, ...]]

    def add(
        self, payloads: Sequence[Payload], mine: dict[int, Tensor], like: Tensor
    ) -> Generator[dist.Work, None, dict[int, Tensor]]:
        """Sum what the homes of each matrix have.

        Args:
            payloads: per matrix, all of one dtype.
            mine: this rank's part (numel,) for each matrix that it is home to, in the order of the matrices.
            like: has the device and the dtype on the wire.

        Returns:
            The sums, by matrix.
        """
        me = self.domain.me
        direct = [payload.is_direct(len(homes)) for payload, homes in zip(payloads, self.homes)]
        out: list[tuple[int, int, Tensor]] = []
        into: list[tuple[int, int, int]] = []
        for number, flat in mine.items():
            homes = self.homes[number]
            cuts = payloads[number].cuts(len(homes))
            own = flat if direct[number] else flat[slice(*_part(cuts, homes.index(me)))]
            for i, peer in enumerate(homes):
                if peer != me:
                    out.append((peer, number, flat if direct[number] else flat[cuts[i] : cuts[i + 1]]))
                    into.append((peer, number, own.numel()))
        arrived = yield from self._move(out, into, like)
        sums = {}
        for number, flat in mine.items():
            homes = self.homes[number]
            own = flat if direct[number] else flat[slice(*_part(payloads[number].cuts(len(homes)), homes.index(me)))]
            # bf16 parts are added up in fp32, and rounded once.
            parts = [own if peer == me else arrived[peer, number] for peer in homes]
            total = parts[0].to(torch.promote_types(like.dtype, torch.float32), copy=True)
            for part in parts[1:]:
                total += part
            sums[number] = total.to(like.dtype)
        if all(direct):
            return sums
        out, into = [], []
        for number in mine:
            homes = self.homes[number]
            cuts = payloads[number].cuts(len(homes))
            for i, peer in enumerate(homes):
                if peer != me and not direct[number]:
                    out.append((peer, number, sums[number]))
                    into.append((peer, number, cuts[i + 1] - cuts[i]))
        arrived = yield from self._move(out, into, like)
        for number in mine:
            if not direct[number]:
                parts = [sums[number] if peer == me else arrived[peer, number] for peer in self.homes[number]]
                sums[number] = torch.cat(parts)
        return sums

    def _move(
        self, out: list[tuple[int, int, Tensor]], into: list[tuple[int, int, int]], like: Tensor
    ) -> Generator[dist.Work, None, dict[tuple[int, int], Tensor]]:
        """Send (peer, matrix, values), get (peer, matrix, elements); by peer, then by matrix, on both sides."""
        out, into = sorted(out, key=lambda item: item[:2]), sorted(into)
        send, receive = [0] * self.domain.size, [0] * self.domain.size
        for peer, _, values in out:
            send[peer] += values.numel()
        for peer, _, elements in into:
            receive[peer] += elements
        sent = torch.cat([values for _, _, values in out]) if out else like.new_empty(0)
        received = like.new_empty(sum(receive))
        work = self.domain.all_to_all(received, sent, receive, send)
        assert work is not None
        yield work
        parts = received.split([elements for _, _, elements in into])
        return {(peer, number): part for (peer, number, _), part in zip(into, parts)}


def _part(cuts: Sequence[int], index: int) -> tuple[int, int]:
    return cuts[index], cuts[index + 1]
