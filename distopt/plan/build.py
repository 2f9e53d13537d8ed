"""The plan: rules matched to layouts. Static, made from shapes and integers alone, the same on every rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from math import prod
from typing import Any

import numpy as np
import torch

from distopt.layouts.base import Partition
from distopt.plan.buckets import Bucket, Entry, Group, GroupPlan, Owned, Piece, Spec, Stack
from distopt.plan.choose import Chooser, Item, cost
from distopt.plan.geometry import Geometry, geometry_of, logical_of
from distopt.plan.owners import Load, assign_owners, spread_turns
from distopt.plan.strategies import Home, check_strategy
from distopt.plan.tiles import LEAST
from distopt.plan.trace import Rounds, trace
from distopt.rule import Rule, Shape

BUCKET_BYTES = 64 << 20
"""Bytes of fp32 updates that one rank holds in one bucket: bounds temporary memory and the size of messages."""
IN_FLIGHT = 3
"""Buckets at once: one being packed, one travelling, one being computed."""
BATCH_NUMEL = 1 << 14
"""Matrices up to this size are computed together; larger ones fill the machine alone, and alone they give the same
bits wherever they are computed."""
WIRE = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What matrices may travel in."""
STACK_NUMEL = 1 << 20
"""Elements in one batch at most: larger ones fall out of the cache."""


def plan_group(group: Group, rank: int) -> GroupPlan:
    """Plan one group for one rank.

    Raises:
        ValueError: a parameter that the rule cannot serve, named, with the remedy; a strategy that it cannot be computed
            with.
    """
    rule = group.rule
    check_strategy(rule, group.strategy)
    for spec in group.specs:
        check_served(spec.name, spec.layout.shape, rule, group.split)
    plan = GroupPlan(rule, group.specs, group.gpu, group.storage, group.split, group.wire, rates=group.rates)
    turns = deal_turns(plan)
    if group.replicas is not None:
        plan.specs = partition_replicas(group, group.replicas, group.replicas.index(rank), turns)
    if plan.elementwise:
        return plan
    specs = plan.specs
    domains: dict[tuple[int, ...], list[tuple[int, Spec, Geometry]]] = defaultdict(list)
    for number, spec in enumerate(specs):
        geometry = geometry_of(spec.layout, plan.logical(number))
        domains[tuple(sorted(spec.layout.ranks))].append((number, spec, geometry))
    for ranks, members in sorted(domains.items()):
        alike: dict[tuple[Rounds, ...], list[Entry]] = defaultdict(list)
        for number, _, geometry in members:
            shapes = geometry.logical.shapes
            rounds_of = {shape: tuple(trace.rounds for _, _, trace in plan.traces(shape)) for shape in set(shapes)}
            for matrix, shape in enumerate(shapes):
                alike[rounds_of[shape]].append(Entry(number, matrix, shape, geometry, turns.get((number, matrix), ())))
        # Only matrices that ask for the same things, round by round, can advance together.
        for rounds, entries in alike.items():
            if any(ask.kind == "whole" for asks in rounds[0] for ask in asks):
                plan.buckets += _matrix_buckets(plan, group, ranks, entries, rank)
            else:
                chunks = _chunks(entries, len(ranks), together=True)
                plan.buckets += [_bucket(specs, rule, ranks, chunk, rank, "in place") for chunk in chunks]
    return plan


def deal_turns(plan: GroupPlan) -> dict[tuple[int, int], tuple[int, ...]]:
    """(parameter, matrix) → when its recurring work is done: the heaviest items first, each to the turn that has least.

    Only shapes and the order of parameters decide, so the schedule is the same on every layout and number of ranks.
    """
    items: list[tuple[int, int]] = []
    costs: list[Load] = []
    for number in range(len(plan.specs)):
        for matrix, shape in enumerate(plan.logical(number).shapes):
            work = plan.rule.recurring(shape)
            items += [(number, matrix)] * len(work)
            costs += [(cost, 0.0) for cost in work.values()]
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for item, turn in zip(items, assign_owners(costs, plan.rule.turns())):
        found[item] = (*found.get(item, ()), turn)
    return found


def check_served(name: str, tensor: tuple[int, ...], rule: Rule, split: str | None) -> None:
    """Refuse a parameter that the rule cannot serve, or that the split does not fit.

    Raises:
        ValueError: names the parameter and the remedy.
    """
    try:
        reason = rule.refuse(logical_of(tensor, rule, split).shape)
    except ValueError as error:
        raise ValueError(
            f"{name!r} of shape {tensor}, split={split!r}: {error}; give it a param group with a split that fits, or none"
        ) from None
    if reason:
        raise ValueError(f"{name!r}: {reason}; route it to AdamW with a param group (rule='adamw')")


def partition_replicas(
    group: Group, ranks: tuple[int, ...], me: int, turns: Mapping[tuple[int, int], tuple[int, ...]]
) -> tuple[Spec, ...]:
    """Give every replica its share of replicated parameters: whole tensors to one rank where the rule wants whole
    matrices, equal flat ranges of their concatenation elsewhere. Parameters that are sharded already stay as they
    are."""
    rule, specs = group.rule, group.specs
    plain = [i for i, spec in enumerate(specs) if len(spec.layout.ranks) == 1]
    sizes = [int(np.prod(specs[i].layout.shape)) for i in plain]
    cuts: list[tuple[int, ...]] = []
    if rule.reach == "matrix":
        costs: list[Load] = []
        work: list[list[tuple[int, float]]] = []
        for i, size in zip(plain, sizes):
            shapes = logical_of(specs[i].layout.shape, rule, group.split).shapes
            costs.append((sum(matrix_cost(rule, shape, group.gpu) for shape in shapes), float(size)))
            recurring = (zip(turns.get((i, m), ()), rule.recurring(shape).values()) for m, shape in enumerate(shapes))
            work.append(list(chain.from_iterable(recurring)))
        owners = assign_owners(costs, len(ranks))
        owners = spread_turns(owners, [specs[i].layout.shape for i in plain], work, len(ranks), rule.turns())
        for owner, size in zip(owners, sizes):
            cuts.append((0,) * (owner + 1) + (size,) * (len(ranks) - owner))
    else:
        total, start = sum(sizes), 0
        bounds = [round(total * i / len(ranks)) for i in range(len(ranks) + 1)]
        for size in sizes:
            cuts.append(tuple(min(max(bound - start, 0), size) for bound in bounds))
            start += size
    out = list(specs)
    for i, cut in zip(plain, cuts):
        out[i] = replace(specs[i], layout=Partition(specs[i].layout.shape, ranks, cut), index=me)
    return tuple(out)


def matrix_work(rule: Rule, shape: Shape, gpu: bool) -> dict[str, float]:
    """FLOPs per step at the owner of a matrix of this shape by kind, averaged over phases; elements where nothing is
    counted."""
    work: dict[str, float] = defaultdict(float)
    if shape.numel:
        for step, share in rule.phases().values():
            for kind, flops in trace(rule, shape, step, gpu).work:
                work[kind] += share * flops
    return dict(work) or {"float32": float(shape.numel)}


def matrix_cost(rule: Rule, shape: Shape, gpu: bool) -> float:
    """The sum of `matrix_work`."""
    return sum(matrix_work(rule, shape, gpu).values())


def _matrix_buckets(
    plan: GroupPlan, group: Group, ranks: tuple[int, ...], entries: list[Entry], rank: int
) -> Iterator[Bucket]:
    """Matrices that lie whole on one rank are computed there; the others get homes."""
    rule = plan.rule
    rates = plan.machine
    busy = plan.costs.setdefault(ranks, np.zeros((3, len(ranks))))
    work = {shape: matrix_work(rule, shape, plan.gpu) for shape in {entry.shape for entry in entries}}
    placed: list[Entry] = []
    assembled: list[Entry] = []
    travelling: list[Entry] = []
    for entry in entries:
        index = entry.geometry.whole_at[entry.matrix]
        if index is None:
            travelling.append(entry)
            continue
        owner = ranks.index(entry.geometry.layout.ranks[index])
        busy[:, owner] += cost(rates, work[entry.shape], 0)
        # Pieces of one matrix that lie apart on one rank are put together by the exchange, which moves nothing then.
        found = assembled if entry.geometry.scattered(entry.matrix) else placed
        found.append(replace(entry, homes=(Home(owner, 0, max(entry.shape.rows, entry.shape.cols)),)))
    plan.homes.setdefault(ranks, []).extend(placed + assembled)
    for chunk in _chunks([entry for entry in placed if ranks[entry.homes[0].rank] == rank], 1):
        yield _bucket(plan.specs, rule, ranks, chunk, rank, "in place")
    for chunk in _chunks(assembled, len(ranks)):
        yield _bucket(plan.specs, rule, ranks, chunk, rank, "owner")
    if not travelling:
        return
    positions = {layout: tuple(map(ranks.index, layout)) for layout in {e.geometry.layout.ranks for e in travelling}}
    items = [Item(e.geometry, e.matrix, work[e.shape], positions[e.geometry.layout.ranks]) for e in travelling]
    choice = Chooser(rule, items, ranks, plan.rounds(entries[0].shape), busy, rates).choose(group.strategy)
    plan.costs[ranks] = choice.loads
    homes = _in_turns(rule, travelling, choice.homes, len(ranks))
    weights = [sum(item.work.values()) for item in items]
    order = sorted(range(len(items)), key=lambda i: (choice.strategies[i], -weights[i], -items[i].shape.numel, i))
    for strategy, numbers in groupby(order, key=lambda i: choice.strategies[i]):
        homed = [replace(travelling[i], homes=homes[i]) for i in numbers]
        plan.homes[ranks] += homed
        for chunk in _chunks(homed, 1 if strategy == "gather" else len(ranks)):
            yield _bucket(plan.specs, rule, ranks, chunk, rank, strategy)


def _in_turns(
    rule: Rule, entries: Sequence[Entry], homes: Sequence[tuple[Home, ...]], ranks: int
) -> Sequence[tuple[Home, ...]]:
    """The homes, such that the recurring work of each rank falls in different steps."""
    if not any(entry.turns for entry in entries):
        return homes
    assert all(len(places) == 1 for places in homes), "recurring work is of rules that keep states with one owner"
    work = [list(zip(entry.turns, rule.recurring(entry.shape).values())) for entry in entries]
    alike = [(entry.shape, entry.geometry.layout.ranks) for entry in entries]
    owners = spread_turns([home.rank for (home,) in homes], alike, work, ranks, rule.turns())
    return [(replace(home, rank=rank),) for (home,), rank in zip(homes, owners)]


def _chunks(entries: list[Entry], ranks: int, *, together: bool = False) -> Iterator[list[Entry]]:
    """Consecutive entries of at most BUCKET_BYTES per rank; `together` keeps the matrices of a tensor in one bucket."""
    chunk: list[Entry] = []
    size = 0
    for entry in entries:
        numbytes = 4 * entry.shape.numel
        boundary = not together or (chunk and chunk[-1].param != entry.param)
        if chunk and boundary and size + numbytes > BUCKET_BYTES * ranks:
            yield chunk
            chunk, size = [], 0
        chunk.append(entry)
        size += numbytes
    if chunk:
        yield chunk


def _bucket(
    specs: Sequence[Spec], rule: Rule, ranks: tuple[int, ...], entries: list[Entry], rank: int, strategy: str
) -> Bucket:
    alike: dict[tuple[Shape, tuple[int, ...], bool, int, int, int, int, Any], list[Piece]] = defaultdict(list)
    for number, entry in enumerate(entries):
        index = specs[entry.param].index
        held = entry.geometry.pieces(index)
        alone = len(held) == 1 and held[0][1].dense
        for rect in entry.geometry.pieces_of(index, entry.matrix):
            # Pieces of several parameters are stacked only where each is all that its parameter has here: then their
            # states share one slab, and nothing is copied.
            siblings = None if alone else (entry.param, rect.stride, rect.step)
            coded = prod(entry.geometry.layout.shape) >= LEAST
            key = (entry.shape, entry.turns, coded, rect.r0, rect.r1, rect.c0, rect.c1, siblings)
            alike[key].append(Piece(number, entry.param, rect))
    stacks = []
    for (shape, turns, *_, siblings), pieces in alike.items():
        together = siblings is None or _evenly_spaced(pieces, _places(specs, entries, pieces[0]))
        limit = stack_limit(rule, shape) if together else 1
        stacks += [Stack(shape, tuple(pieces[i : i + limit]), turns) for i in range(0, len(pieces), limit)]
    owned = []
    if strategy != "in place":
        me = ranks.index(rank)
        same: dict[tuple[Shape, int, tuple[int, ...]], list[int]] = defaultdict(list)
        for number, entry in enumerate(entries):
            for home in entry.homes:
                if home.rank == me:
                    same[entry.shape, home.stop - home.start, entry.turns].append(number)
        for (shape, length, turns), numbers in same.items():
            limit = stack_limit(rule, shape)
            owned += [Owned(shape, tuple(numbers[i : i + limit]), length, turns) for i in range(0, len(numbers), limit)]
        if not owned and not stacks:  # a rank with nothing takes part in the sums, and asks the rule how many
            shape = entries[0].shape
            owned = [Owned(shape, (), max(shape.rows, shape.cols))]
    return Bucket(ranks, tuple(entries), tuple(stacks), tuple(owned), strategy)


def _places(specs: Sequence[Spec], entries: Sequence[Entry], piece: Piece) -> dict[int, int]:
    """In which order the pieces of a parameter lie here, by offset."""
    return entries[piece.entry].geometry.places(specs[piece.param].index)


def _evenly_spaced(pieces: Sequence[Piece], places: dict[int, int]) -> bool:
    """Whether the pieces lie at equal distances in their parameter and with no others between them, so that one strided
    view holds them all, and another one their statistics."""
    offsets = [piece.rect.offset for piece in pieces]
    apart = {(b - a, places[b] - places[a]) for a, b in zip(offsets, offsets[1:])}
    return len(apart) <= 1 and all(step == 1 for _, step in apart)


def stack_limit(rule: Rule, shape: Shape) -> int:
    """How many matrices of this shape are computed together."""
    if not rule.batched or shape.numel > BATCH_NUMEL:
        return 1
    return max(1, STACK_NUMEL // shape.numel)
