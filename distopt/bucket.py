"""A bucket bound to its tensors: drives the rule over its stacks in lock-step, and commits what they return.

It knows requests and stacks; no rule by name and no layout by kind.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.exchange import Exchange
from distopt.comm.groups import Domain
from distopt.comm.pipeline import Barrier, Run
from distopt.comm.reductions import Reductions
from distopt.comm.routes import routes
from distopt.comm.sums import Sums
from distopt.kernels import stretch_kernels
from distopt.matrix.triangle import pack, unpack
from distopt.plan.buckets import Bucket, Stack
from distopt.plan.strategies import Payload, is_tall, sides, slice_work
from distopt.plan.tiles import Storage
from distopt.plan.trace import Ask, Rounds, step_values
from distopt.rule import Back, Reduction, Rule, Shape, StateView, Step, Through, Whole
from distopt.state.coded import Coded, read_all, write_all
from distopt.state.commit import put
from distopt.state.noise import Key
from distopt.state.sections import Paged
from distopt.state.windows import Slabs, Window, allocate_stacks, no_extent, strided
from distopt.state.working import Working


class BoundBucket:
    """A bucket with its tensors: the stacks of pieces, the owned matrices, the states of both."""

    def __init__(
        self,
        bucket: Bucket,
        rule: Rule,
        windows: list[Window],
        pieces: dict[int, Any],
        domain: Domain,
        device: torch.device,
        rounds: Rounds,
        storage: Storage,
        make: Any,
    ) -> None:
        self.bucket, self.windows, self.domain, self.device = bucket, windows, domain, device
        self.gpu = device.type != "cpu"
        self.stretches = stretch_kernels(device)
        self.slabs, self.owned_slabs = allocate_stacks(rule, bucket, windows, pieces, device, storage, make)
        self.reductions = Reductions(bucket, domain, device)
        self.rounds = rounds
        self.routes = routes(bucket, [window.spec.index for window in windows], domain) if bucket.exchanged else None
        self.sums = Sums(domain, [tuple(home.rank for home in entry.homes) for entry in bucket.entries])
        owned = [entry for entry in bucket.entries if not bucket.exchanged or entry.owner == domain.me]
        lying = [
            (number, None, name)
            for number in dict.fromkeys(e.param for e in bucket.entries)
            for name in rule.states(bucket.entries[0].shape)
        ]
        self.stored = lying + [(e.param, e.matrix, name) for e in owned for name in rule.states(e.shape)]
        """States that a step reads, by parameter, matrix and name, in about that order."""
        self.closes: list[int] = []
        """Parameters whose last bucket this is; set by the group."""

    def run(
        self,
        rule: Rule,
        step: int,
        grads: list[Tensor],
        inert: set[int],
        working: Working,
        scalars: dict[str, Tensor],
        share: float,
    ) -> Run:
        """One step: start every stack's generator, answer round by round, commit.

        `working` decodes states that are stored as codes. `scalars` are the states of the group; new values are put
        there, for the group to commit. `share` is one over the number of copies of these parameters.
        """
        bucket = self.bucket
        before = dict(scalars)
        runs: list[Generator[Any, Any, Tensor]] = []
        views: list[StateView] = []
        working.open(piece.param for stack in bucket.stacks for piece in stack.pieces)
        for stack, slabs in zip(bucket.stacks, self.slabs):
            lying = self._lying(stack, slabs, working)
            views.append(StateView({**slabs.tensors, **_decoded(slabs), **lying, **before}))
            h = self._values(rule, step, stack.shape, stack.turns)
            weights = {piece.param: working.weight(piece.param) for piece in stack.pieces}
            runs.append(rule.update(_load(grads, stack), _load(weights, stack), views[-1], h))
        for group, slabs in zip(bucket.owned, self.owned_slabs):
            views.append(StateView({**slabs.tensors, **_decoded(slabs)}))
            nothing = torch.empty((0, group.shape.rows, group.shape.cols), device=self.device)
            h = self._values(rule, step, group.shape, group.turns)
            runs.append(rule.update(nothing, nothing, views[-1], h))
        if before and not runs:  # nothing lies here, but the group's states move on
            shape = bucket.entries[0].shape
            nothing = torch.empty((0, shape.rows, shape.cols), device=self.device)
            states = {
                name: torch.empty(no_extent(s, shape), device=self.device) for name, s in rule.states(shape).items()
            }
            views.append(StateView({**states, **before}))
            runs.append(rule.update(nothing, nothing, views[-1], self._values(rule, step, shape)))
        answers: list[Any] = [None] * len(runs)
        values: list[Tensor] = []
        for asks in self.rounds:
            requests = [_normalize(run.send(answer)) for run, answer in zip(runs, answers)]
            answered = yield from self._answer(asks, requests, inert, share)
            answers = [found if len(asks) > 1 else found[0] for found in answered]
        for run, answer in zip(runs, answers):
            try:
                run.send(answer)
            except StopIteration as end:
                values.append(end.value)
        assert len(values) == len(runs)
        for view in views:
            scalars.update({name: view.new[name] for name in before if name in view.new})
        self._commit(views, inert, working)
        for stack, value in zip(bucket.stacks, values):
            for item, piece in enumerate(stack.pieces):
                if piece.param not in inert:
                    put(_view(working.weight(piece.param), piece.rect), value[item], working.ok)
        yield from self.close(inert, working)

    def _values(self, rule: Rule, step: int, shape: Shape, turns: tuple[int, ...] = ()) -> Step:
        return step_values(rule, step, shape, self.gpu, turns, self.stretches)

    def close(self, inert: set[int], working: Working) -> Generator[dist.Work | None, None, None]:
        """Store the coded states of the parameters whose last bucket this is."""
        yield from working.close([number for number in self.closes if number not in inert], self.domain, self.device)

    def _lying(self, stack: Stack, slabs: Slabs, working: Working) -> dict[str, Tensor]:
        """The coded states of a stack that lie as its pieces do, decoded."""
        params = {piece.param for piece in stack.pieces}
        names = [name for name, kind in slabs.kinds.items() if kind == "like" and name not in slabs.tensors]
        return {name: _load({param: working.state(param, name) for param in params}, stack) for name in names}

    def observe(
        self, rule: Rule, name: str, step: int, values: list[Tensor], inert: set[int], working: Working
    ) -> None:
        """Hand every piece its part of an observation, and commit what the rule makes of it."""
        views: list[StateView] = []
        for stack, slabs in zip(self.bucket.stacks, self.slabs):
            views.append(StateView({**slabs.tensors, **_decoded(slabs), **self._lying(stack, slabs, working)}))
            value = _load(values, stack) if rule.observes[name] == "like" else self._rows(values, stack)
            rule.observe(name, value, views[-1], self._values(rule, step, stack.shape, stack.turns))
        self._commit(views, inert, working)

    def _rows(self, values: list[Tensor], stack: Stack) -> Tensor:
        """The stack's part (k, rows, 1) of one number per row of each parameter."""
        entries = [self.bucket.entries[piece.entry] for piece in stack.pieces]
        starts = [entry.geometry.logical.starts("row")[entry.matrix] + stack.rect.r0 for entry in entries]
        found = [values[p.param][start : start + stack.size[1]] for p, start in zip(stack.pieces, starts)]
        return torch.stack(found).unsqueeze(-1)

    def _answer(
        self, asks: tuple[Ask, ...], requests: list[tuple[Any, ...]], inert: set[int], share: float
    ) -> Generator[Any, Any, list[list[Tensor]]]:
        """All requests of one round. Stacks of pieces come first, owned matrices after them."""
        pieces = len(self.bucket.stacks)
        answers: list[list[Any]] = [[None] * len(asks) for _ in requests]
        local = [q for q, ask in enumerate(asks) if ask.kind in ("sum", "mean", "max") and ask.scope != "optimizer"]
        if local:
            asked = [tuple(requests[i][q] for q in local) for i in range(pieces)]
            found = yield from self.reductions.answer(tuple(asks[q] for q in local), asked)
            for i, answer in enumerate(found):
                for q, value in zip(local, answer):
                    answers[i][q] = value
            for i in range(pieces, len(requests)):
                for q in local:
                    answers[i][q] = _reduced_nothing(requests[i][q])
        for q, ask in enumerate(asks):
            column = [request[q] for request in requests]
            if q in local:
                continue
            if ask.scope == "optimizer":
                total = yield Barrier(self._partial(ask, column, inert, share), "max" if ask.kind == "max" else "sum")
                found_all = [total.view(1, 1, 1)] * len(requests)
            elif ask.kind == "through":
                found_all = yield from self._through(column)
            elif self.routes is None:
                found_all = [_settled(_through_wire(request.x, ask.dtype)) for request in column]
            elif ask.kind == "whole":
                found_all = yield from self._whole(self.routes[0], column, ask.dtype)
            else:
                found_all = yield from self._back(self.routes[1], column, ask.dtype)
            if ask.kind in ("whole", "back"):
                found_all = [value.to(request.x.dtype) for value, request in zip(found_all, column)]
            for i, value in enumerate(found_all):
                answers[i][q] = value
        return answers

    def _whole(self, exchange: Exchange, column: list[Whole], dtype: torch.dtype) -> Generator[Any, Any, list[Tensor]]:
        bucket = self.bucket
        sources = [request.x for request in column[: len(bucket.stacks)]]
        sample = torch.empty(0, dtype=dtype, device=self.device)
        targets = [sample.new_empty(owned.size) for owned in bucket.owned]
        yield from exchange.forward(sources, targets, sample)
        nothing = [sample.new_empty((0, stack.shape.rows, stack.shape.cols)) for stack in bucket.stacks]
        return nothing + targets

    def _through(self, column: list[Through]) -> Generator[Any, Any, list[Tensor]]:
        """Of whole matrices at once; of slices in step, over the rounds of sums that the transform asks for."""
        bucket, pieces = self.bucket, len(self.bucket.stacks)
        if not bucket.sliced:
            return [request.transform(request.x) for request in column]
        payloads = [slice_work(column[0].transform, sides(entry.shape)[0], 1)[1] for entry in bucket.entries]
        runs = [
            request.transform.by_slices(request.x.mT if is_tall(owned.shape) else request.x)
            for request, owned in zip(column[pieces:], bucket.owned)
        ]
        partials = [next(run) for run in runs]
        found: list[Tensor] = []
        for number in range(len(payloads[0])):
            sums = yield from self._summed(partials, [rounds[number] for rounds in payloads])
            partials = []
            for run, total in zip(runs, sums):
                try:
                    partials.append(run.send(total))
                except StopIteration as end:
                    found.append(end.value)
        assert len(found) == len(runs)
        slices = [x.mT if is_tall(owned.shape) else x for x, owned in zip(found, bucket.owned)]
        return [request.x for request in column[:pieces]] + slices

    def _summed(self, partials: list[Tensor], payloads: list[Payload]) -> Generator[Any, Any, list[Tensor]]:
        """Sums of the stacks (k, n, n) or (k, 1, 1) that each stack of slices has."""
        packed = [pack(partial).flatten(1) for partial in partials]
        mine = {
            number: flat
            for owned, stack in zip(self.bucket.owned, packed)
            for number, flat in zip(owned.entries, stack)
        }
        like = torch.empty(0, dtype=payloads[0].dtype, device=self.device)
        sums = yield from self.sums.add(payloads, dict(sorted(mine.items())), like)
        totals = []
        for owned, partial in zip(self.bucket.owned, partials):
            found = [sums[number].view(-1, partial.shape[-1]) for number in owned.entries]
            totals.append(unpack(torch.stack(found)) if found else partial)
        return totals

    def _back(self, exchange: Exchange, column: list[Back], dtype: torch.dtype) -> Generator[Any, Any, list[Tensor]]:
        bucket = self.bucket
        sources = [request.x for request in column[len(bucket.stacks) :]]
        sample = torch.empty(0, dtype=dtype, device=self.device)
        targets = [sample.new_empty(stack.size) for stack in bucket.stacks]
        yield from exchange.backward(sources, targets, sample)
        return targets + [sample.new_empty((0, o.shape.rows, o.shape.cols)) for o in bucket.owned]

    def _partial(self, ask: Ask, column: list[Reduction], inert: set[int], share: float) -> Tensor:
        """This rank's part of a sum (or maximum) of optimizer scope."""
        parts = []
        for request, stack in zip(column, self.bucket.stacks):
            kept = [i for i, piece in enumerate(stack.pieces) if piece.param not in inert]
            alone = [request.x] if len(kept) == len(stack.pieces) else [request.x[i : i + 1] for i in kept]
            parts += [torch.cat(alone)] if len(alone) > 1 else alone  # a list of indices would travel to the device
        parts = [part for part in parts if part.numel()]
        if ask.kind == "max":
            parts = [part.amax() for part in parts] or [torch.full((), -torch.inf, device=self.device)]
            return torch.stack(parts).amax().view(1)
        return (share * sum((part.sum() for part in parts), torch.zeros((), device=self.device))).view(1)

    def _commit(self, views: list[StateView], inert: set[int], working: Working) -> None:
        """Write new states; those of parameters without a gradient anywhere stay as they were."""
        bucket = self.bucket
        for stack, slabs, view in zip(bucket.stacks, self.slabs, views):
            kept = [piece.param not in inert for piece in stack.pieces]
            for name, new in view.new.items():
                if name in slabs.coded:
                    _encode(slabs.coded[name], new, kept, working.key(name), working.ok)
                elif name in slabs.tensors:
                    _write(slabs.tensors[name], new, kept, working.ok)
                elif slabs.kinds[name] == "like":
                    for item, (piece, keep) in enumerate(zip(stack.pieces, kept)):
                        if keep:
                            _view(working.state(piece.param, name), piece.rect).copy_(new[item])
        for group, slabs, view in zip(bucket.owned, self.owned_slabs, views[len(bucket.stacks) :]):
            kept = [bucket.entries[number].param not in inert for number in group.entries]
            for name, new in view.new.items():
                if name in slabs.coded:
                    _encode(slabs.coded[name], new, kept, working.key(name), working.ok)
                elif slabs.kinds[name] == "owner":
                    _write(slabs.tensors[name], new, kept, working.ok)


def _through_wire(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What arrives of `x` where this dtype travels."""
    return x.to(dtype).to(x.dtype) if dtype.itemsize < x.dtype.itemsize else x


def _settled(matrices: Tensor) -> Tensor:
    """Matrices as those are that have travelled: one after the other from the start of a cache line. Products of others
    may have other bits."""
    aligned = matrices.is_contiguous() and matrices.data_ptr() % 64 == 0
    return matrices if aligned else matrices.clone(memory_format=torch.contiguous_format)


def _decoded(slabs: Slabs) -> dict[str, Tensor]:
    """The coded states of owner kind as stacks (k, rows, cols)."""
    stores = [store for group in slabs.coded.values() for store in group]
    matrices = [flat.view(store.shape) for flat, store in zip(read_all(stores), stores)][::-1]
    return {name: torch.stack([matrices.pop() for _ in group]) for name, group in slabs.coded.items()}


def _encode(stores: list[Coded | Paged], new: Tensor, kept: list[bool], key: Key, ok: Tensor | None) -> None:
    write_all([(store, value.reshape(-1), None, key) for store, value, keep in zip(stores, new, kept) if keep], ok)


def _load(flats: list[Tensor] | dict[int, Tensor], stack: Stack) -> Tensor:
    """The stack (k, rows, cols) in fp32: a view where one can be had."""
    if len({piece.param for piece in stack.pieces}) == 1:
        found = strided(flats[stack.pieces[0].param], stack).float()
        # Sums over another order of strides would have other bits than the same matrix stored alone.
        return found if stack.rect.dense else found.contiguous()
    return torch.stack([_view(flats[piece.param], piece.rect) for piece in stack.pieces]).float()


def _view(flat: Tensor, rect: Any) -> Tensor:
    return flat.as_strided(
        (rect.r1 - rect.r0, rect.c1 - rect.c0), (rect.stride, rect.step), flat.storage_offset() + rect.offset
    )


def _write(old: Tensor, new: Tensor, kept: list[bool], ok: Tensor | None) -> None:
    if all(kept) or old.shape[0] != len(kept):
        put(old, new, ok)
        return
    for item, keep in enumerate(kept):
        if keep:
            put(old[item], new[item], ok)


def _normalize(requests: Any) -> tuple[Any, ...]:
    return requests if isinstance(requests, tuple) else (requests,)


def _reduced_nothing(request: Reduction) -> Tensor:
    """The answer to a stack of no pieces."""
    rows, cols = request.x.shape[1:]
    return request.x.new_zeros((0, 1 if request.dim in (-2, None) else rows, 1 if request.dim in (-1, None) else cols))
