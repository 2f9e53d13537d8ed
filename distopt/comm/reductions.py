"""Coalesced reductions: all sums of a round of a bucket in one all-reduce, all maxima in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.groups import Domain
from distopt.plan.buckets import Bucket
from distopt.plan.fields import Field, fields_of
from distopt.plan.trace import Ask
from distopt.rule import Reduction, Shape


class Reductions:
    """The reductions of one bucket. Partial results of pieces are added into a buffer laid out by entries; what lies
    whole on this rank is answered without it."""

    def __init__(self, bucket: Bucket, domain: Domain, device: torch.device) -> None:
        self.bucket, self.domain, self.device = bucket, domain, device
        self.totals: Counter[tuple[int, int]] = Counter()
        for entry in bucket.entries:  # the matrices of a tensor are in one bucket
            self.totals[entry.weight] += entry.shape.numel
        self._fields: dict[Ask, dict[Shape | None, Field]] = {}
        self._indices: dict[tuple[Ask, int], Tensor] = {}
        self._counts: dict[int, Tensor] = {}

    def answer(
        self, asks: tuple[Ask, ...], asked: list[tuple[Reduction, ...]]
    ) -> Generator[dist.Work | None, None, list[list[Tensor]]]:
        """Answer one round: `asked[i]` are the requests of stack i, matching `asks`. Yields what has to be waited for."""
        buffers: list[dict[Shape | None, Tensor]] = [{} for _ in asks]
        for op in ("sum", "max"):
            mine = [q for q, ask in enumerate(asks) if (ask.kind == "max") == (op == "max")]
            fields = [(q, shape, field) for q in mine for shape, field in self._layout(asks[q]).items()]
            if not fields:
                continue
            sizes = [field.numel for _, _, field in fields]
            flat = torch.full((sum(sizes),), 0.0 if op == "sum" else -torch.inf, device=self.device)
            for (q, shape, field), part in zip(fields, flat.split(sizes)):
                buffers[q][shape] = part.view(-1, field.length)
            for position, requests in enumerate(asked):
                for q in mine:
                    self._add(position, asks[q], requests[q], buffers[q])
            yield self.domain.all_reduce(flat, op)
        return [
            [self._read(position, ask, request, buffer) for ask, request, buffer in zip(asks, requests, buffers)]
            for position, requests in enumerate(asked)
        ]

    def _layout(self, ask: Ask) -> dict[Shape | None, Field]:
        if ask not in self._fields:
            self._fields[ask] = fields_of(self.bucket.entries, ask)
        return self._fields[ask]

    def _runs(self, position: int, ask: Ask, buffers: dict[Shape | None, Tensor]) -> tuple[Tensor, Tensor] | None:
        """(which runs, the part of them that this stack's pieces cover); None where the piece has all of the dim."""
        stack = self.bucket.stacks[position]
        rect, shape = stack.rect, stack.shape
        if ask.scope == "tensor":
            return self._index(position, ask, None), buffers[None]
        full_rows, full_cols = rect.c1 - rect.c0 == shape.cols, rect.r1 - rect.r0 == shape.rows
        if {-1: full_rows, -2: full_cols, None: full_rows and full_cols}[ask.dim]:
            return None
        part = slice(None)
        if ask.of == "like" and ask.dim is not None:
            part = slice(rect.r0, rect.r1) if ask.dim == -1 else slice(rect.c0, rect.c1)
        return self._index(position, ask, shape), buffers[shape][:, part]

    def _index(self, position: int, ask: Ask, shape: Shape | None, kept: list[int] | None = None) -> Tensor:
        if (ask, position) not in self._indices:
            rows = self._layout(ask)[shape].rows
            pieces = self.bucket.stacks[position].pieces
            found = [rows[piece.entry] for i, piece in enumerate(pieces) if kept is None or i in kept]
            self._indices[ask, position] = torch.tensor(found, device=self.device)
        return self._indices[ask, position]

    def _add(self, position: int, ask: Ask, request: Reduction, buffers: dict[Shape | None, Tensor]) -> None:
        runs = self._runs(position, ask, buffers)
        stack = self.bucket.stacks[position]
        # What has all of a statistic needs no other's part of it, but others, whose piece has less, need its own.
        lends = runs is None and ask.of in ("row", "col")
        kept = [i for i, piece in enumerate(stack.pieces) if lends and self.bucket.entries[piece.entry].split(ask.dim)]
        if runs is None and not kept:
            return
        index, into = runs or (self._index(position, ask, stack.shape, kept), buffers[stack.shape])
        partial = _partial(ask, request.x)[kept] if kept else _partial(ask, request.x)
        # A row statistic is known to all who hold part of the row: each adds it in proportion to what it holds.
        if ask.of == "row":
            partial = partial * ((stack.rect.c1 - stack.rect.c0) / stack.shape.cols)
        elif ask.of == "col":
            partial = partial * ((stack.rect.r1 - stack.rect.r0) / stack.shape.rows)
        flat = partial.reshape(len(index), -1)
        if ask.kind == "max":
            into.index_reduce_(0, index, flat, "amax")
        else:
            into.index_add_(0, index, flat)

    def _read(self, position: int, ask: Ask, request: Reduction, buffers: dict[Shape | None, Tensor]) -> Tensor:
        stack = self.bucket.stacks[position]
        runs = self._runs(position, ask, buffers)
        if runs is None:
            answer = _partial(ask, request.x)
        else:
            index, part = runs
            k = len(stack.pieces)
            flat = part[index]
            answer = flat.view(k, 1, -1) if ask.dim == -2 else flat.view(k, -1, 1)
        if ask.kind == "mean":
            answer = answer / self._count(position, ask)
        return answer

    def _count(self, position: int, ask: Ask) -> int | Tensor:
        """What a mean divides by."""
        stack = self.bucket.stacks[position]
        if ask.scope == "tensor":
            totals = [self.totals[self.bucket.entries[piece.entry].weight] for piece in stack.pieces]
            if len(set(totals)) == 1:
                return totals[0]
            if position not in self._counts:
                self._counts[position] = torch.tensor(totals, device=self.device).view(-1, 1, 1)
            return self._counts[position]
        rows = stack.shape.rows if ask.dim != -1 and ask.of != "col" else 1
        cols = stack.shape.cols if ask.dim != -2 and ask.of != "row" else 1
        return rows * cols


def _partial(ask: Ask, x: Tensor) -> Tensor:
    dims = (-2, -1) if ask.dim is None else (ask.dim,)
    return x.amax(dims, keepdim=True) if ask.kind == "max" else x.sum(dims, keepdim=True)
