"""Bytes of the states that ranks hold, as they are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from distopt.layouts.base import Layout, Plain
from distopt.plan.buckets import Bucket, Entry, GroupPlan, Stack
from distopt.plan.tiles import BLOCK, Tiles, coded_bytes, join_tiles, local_tiles, shared_tiles, whole_tiles
from distopt.rule import Shape, State

Home = tuple[Layout, int]
"""A parameter's layout and a rank's position in it."""


def state_bytes(plan: GroupPlan) -> tuple[int, int]:
    """(here, on one process that holds everything) bytes of states."""
    here: list[Home] = [(spec.layout, spec.index) for spec in plan.specs]
    whole: list[Home] = [(Plain(spec.layout.shape, (0,)), 0) for spec in plan.specs]
    rests = [_master_bytes(plan, here), _master_bytes(plan, whole)]
    if plan.elementwise:
        return rests[0] + _elementwise_bytes(plan, here), rests[1] + _elementwise_bytes(plan, whole)
    held = rests[0] + _lying_bytes(plan, here)
    for bucket in plan.buckets:
        held += sum(_stack_bytes(plan, bucket, stack) for stack in bucket.stacks)
        held += sum(len(owned.entries) * owner_bytes(plan, owned.shape) for owned in bucket.owned)
    total = rests[1] + _lying_bytes(plan, whole)
    for shape, count in (item for shapes in _matrices(plan) for item in Counter(shapes).items()):
        size = {"row": shape.rows, "col": shape.cols, "matrix": 1}
        statistics = sum(4 * size.get(state.kind, 0) for state in plan.rule.states(shape).values())
        total += count * (statistics + owner_bytes(plan, shape))
    return held, total


def agreement_bytes(plan: GroupPlan) -> int:
    """Bytes, either way, of the reductions in which ranks agree on the scales of tiles that an edge of a shard cuts."""
    slots = 0
    for spec, shapes in zip(plan.specs, _matrices(plan)):
        states = plan.rule.states(shapes[0]).items() if shapes else ()
        codecs = [plan.storage.codec(name, s, spec.layout.shape) for name, s in states if s.kind == "like"]
        slots += sum(len(shared_tiles(spec.layout)) for codec in codecs if codec and codec.scaled)
    return 4 * slots


def _matrices(plan: GroupPlan) -> Iterator[Sequence[Shape]]:
    """The shapes of each parameter's logical matrices."""
    for number in range(len(plan.specs)):
        yield plan.logical(number).shapes


def _bytes(plan: GroupPlan, name: str, state: State, shape: tuple[int, ...], tiles: Tiles) -> int:
    codec = plan.storage.codec(name, state, shape)
    return coded_bytes(codec, tiles, plan.gpu) if codec else 4 * tiles.numel


def _master_bytes(plan: GroupPlan, homes: list[Home]) -> int:
    """Of what is kept of fp32 weights beside parameters of lower precision."""
    kept = [home for home, spec in zip(homes, plan.specs) if plan.storage.mastered(spec.itemsize)]
    return sum(plan.storage.master.bits // 8 * _numel(home) for home in kept)


def _elementwise_bytes(plan: GroupPlan, homes: list[Home]) -> int:
    states = {name: state for name, state in plan.rule.states(Shape(1, 1, 1)).items() if state.kind == "like"}
    dtypes = [spec.dtype for spec in plan.specs]
    exact = [home for home, t in zip(homes, dtypes) if not plan.storage.coded(states, home[0].shape, t.itemsize)]
    found = sum(4 * len(states) * _numel(home) for home in exact)
    for members in plan.storage.pack([layout for layout, _ in homes], dtypes, states):
        tiles = join_tiles([local_tiles(*homes[i]) for i in members], [0] * len(members))
        shape = homes[members[0]][0].shape
        found += sum(_bytes(plan, name, state, shape, tiles) for name, state in states.items())
    return found


def _lying_bytes(plan: GroupPlan, homes: list[Home]) -> int:
    """Of the states that lie as parameters do."""
    found = 0
    for (layout, index), shapes in zip(homes, _matrices(plan)):
        for name, state in plan.rule.states(shapes[0]).items() if shapes else ():
            if state.kind == "like" and plan.storage.codec(name, state, layout.shape):
                found += _bytes(plan, name, state, layout.shape, local_tiles(layout, index))
            elif state.kind == "like":
                found += 4 * _numel((layout, index))
    return found


def _stack_bytes(plan: GroupPlan, bucket: Bucket, stack: Stack) -> int:
    """Of a stack's statistics, and of what lives with owners, who compute it here."""
    k, rows, cols = stack.size
    size = {"row": rows, "col": cols, "matrix": 1}
    statistics = sum(4 * size.get(state.kind, 0) for state in plan.rule.states(stack.shape).values())
    return k * (statistics + (0 if bucket.exchanged else owner_bytes(plan, stack.shape)))


def owner_bytes(plan: GroupPlan, shape: Shape) -> int:
    """Of what lives with the owner of one matrix."""
    states = ((name, state) for name, state in plan.rule.states(shape).items() if state.kind == "owner")
    return sum(_bytes(plan, n, s, (), whole_tiles(*plan.storage.extent(s))) for n, s in states)


def lying_bytes(plan: GroupPlan, entry: Entry, counts: dict[str, np.ndarray]) -> np.ndarray:
    """Of what lies where a matrix does, from the elements of each kind of state on each rank; of tiles that an edge cuts,
    the scale is shared out."""
    shape, found = entry.geometry.layout.shape, np.zeros(len(counts["like"]))
    for name, state in plan.rule.states(entry.shape).items():
        if state.kind in counts:
            codec = plan.storage.codec(name, state, shape)
            each = codec.bits / 8 + (4 / BLOCK if codec.scaled else 0) if codec else 4
            found += each * counts[state.kind]
    return found


def _numel(home: Home) -> int:
    layout, index = home
    return sum(rect.numel for rect in layout.rects(index, max(len(layout.shape) - 1, 0)))
