"""Plans on paper: what every rank of a mesh that need not exist computes, sends, keeps and waits for.

A plan is made for one rank; what it knows of the others (owners, who holds which piece) is the same on all of them, so
that the loads of a thousand ranks cost one plan and some arrays over ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import lcm, prod
from typing import Any

import numpy as np

from distopt.layouts import Layout, Plain, Sharded
from distopt.layouts.base import Partition
from distopt.layouts.dtensor import Axis
from distopt.plan.buckets import Bucket, Entry, GroupPlan
from distopt.plan.build import BUCKET_BYTES, IN_FLIGHT
from distopt.plan.cost import Rates
from distopt.plan.fields import fields_of
from distopt.plan.geometry import Geometry, geometry_of, logical_of
from distopt.plan.held import agreement_bytes, lying_bytes, owner_bytes, state_bytes
from distopt.plan.report import asked_bytes, ordinary_rounds, travelling_elements
from distopt.plan.strategies import sides, slice_work
from distopt.plan.trace import Footprint, footprint, trace
from distopt.rule import Shape

AXES = ("replicate", "dp", "tp")
ROWWISE, COLUMNWISE = {"o_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


@dataclass(frozen=True)
class Mesh:
    """Ranks in row-major order over (replicate, dp, tp): copies of the model, FSDP2's shards, tensor parallelism."""

    replicate: int = 1
    dp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read "dp=128,tp=8".

        Raises:
            ValueError: an axis that is unknown or there twice, or a size that is no positive integer.
        """
        sizes: dict[str, int] = {}
        for word in text.split(","):
            name, _, size = word.strip().partition("=")
            if name not in AXES:
                raise ValueError(
                    f"mesh {text!r}: no axis {name!r}; there are {', '.join(AXES)}. Context parallelism shards parameters "
                    "as dp does: multiply it in; plan pipeline stages one by one, each with its own layers"
                )
            if name in sizes:
                raise ValueError(f"mesh {text!r}: {name} is there twice")
            if not size.isdecimal() or int(size) < 1:
                raise ValueError(f"mesh {text!r}: {name} needs a positive integer, got {size!r}")
            sizes[name] = int(size)
        return cls(**sizes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of the axes."""
        return self.replicate, self.dp, self.tp

    @property
    def size(self) -> int:
        """Number of ranks."""
        return prod(self.shape)

    @cached_property
    def coordinates(self) -> np.ndarray:
        """(3, ranks): the position of each rank on each axis."""
        return np.stack(np.unravel_index(np.arange(self.size), self.shape))

    def layout(self, shape: tuple[int, ...], tp_dim: int | None) -> Layout:
        """Rank 0's layout of a parameter: its dim `tp_dim` over tp, dim 0 of that over dp, as FSDP2 does."""
        cut = tp_dim is not None and self.tp > 1
        sizes = [self.dp if self.dp > 1 else 1, self.tp if cut else 1]
        ranks = np.arange(self.size).reshape(self.shape)[0, :, : sizes[1]].flatten().tolist()
        axes = [Axis(self.dp, 0, strided=cut and tp_dim == 0)] if self.dp > 1 else []
        if cut:
            assert tp_dim is not None
            axes.append(Axis(self.tp, tp_dim))
        return Sharded(shape, tuple(ranks), tuple(axes)) if axes else Plain(shape, (0,))

    def positions(self, ranks: tuple[int, ...]) -> np.ndarray:
        """For every rank, where it stands among the ranks of its own copy; `ranks` is rank 0's copy, which spans some
        axes whole."""
        members = np.array(sorted(ranks))
        spanned = (self.coordinates[:, members] != 0).any(1)
        assert len(members) == prod(n for n, axis in zip(self.shape, spanned) if axis), "not a part of the mesh"
        own = np.ravel_multi_index(tuple(self.coordinates * spanned[:, None]), self.shape)
        return np.searchsorted(members, own)


def tensor_parallel_dim(name: str, shape: tuple[int, ...]) -> int | None:
    """The dim that tensor parallelism shards, for the projections of Llama and its kin; None where it replicates:
    column-wise q, k, v, gate and up (with their biases), row-wise o and down."""
    module = name.split(".")[-2] if "." in name else name
    if module in COLUMNWISE:
        return 0
    return 1 if module in ROWWISE and len(shape) == 2 else None


def _zero() -> np.ndarray:
    return np.zeros(1)


@dataclass
class Loads:
    """What one strategy of one group costs in one step: arrays over the ranks of the mesh.

    sent, received, state and temporary are bytes, without self-traffic; `temporary` is an estimate from above (1.0 to 2.2
    times what one process held) of what matrices need beside states: buckets in flight and the workspace of the largest;
    elementwise groups step in place. flops are those of the average step. compute, memory and wire are seconds; `compute`
    is (steps of one cycle, ranks), since work that is not done in every step takes turns.
    """

    matrices: int = 0
    elements: int = 0
    flops: np.ndarray = field(default_factory=_zero)
    sent: np.ndarray = field(default_factory=_zero)
    received: np.ndarray = field(default_factory=_zero)
    state: np.ndarray = field(default_factory=_zero)
    temporary: np.ndarray = field(default_factory=_zero)
    compute: np.ndarray = field(default_factory=lambda: np.zeros((1, 1)))
    memory: np.ndarray = field(default_factory=_zero)
    wire: np.ndarray = field(default_factory=_zero)

    @property
    def seconds(self) -> np.ndarray:
        """Expected time, nothing overlapped: (steps of one cycle, ranks)."""
        return self.compute + self.memory + self.wire

    def __add__(self, other: Loads) -> Loads:
        cycle = lcm(len(self.compute), len(other.compute))
        found = {
            name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__ if name != "compute"
        }
        found["compute"] = sum(np.tile(x.compute, (cycle // len(x.compute), 1)) for x in (self, other))
        # Groups step one after the other.
        found["temporary"] = np.maximum(self.temporary, other.temporary)
        return Loads(**found)


def total(loads: Mapping[Any, Loads]) -> Loads:
    """All of them together."""
    return sum(loads.values(), Loads())


def loads_of(plan: GroupPlan, mesh: Mesh, rates: Rates) -> dict[str, Loads]:
    """What a group costs every rank of `mesh`, by strategy; `plan` is rank 0's."""
    found: dict[str, Loads] = defaultdict(Loads)
    if plan.elementwise:
        _add_elementwise(found["elementwise"], plan, mesh, rates)
    for ranks, entries in plan.homes.items():
        where = mesh.positions(ranks)
        whole = [entry for entry in entries if entry.geometry.whole_at[entry.matrix] is not None]
        for entry in whole:
            _add_entry(found["in place"], plan, entry, where, rates)
        if whole:
            _add_working(found["in place"], plan, whole, where)
    for bucket in plan.buckets:
        where = mesh.positions(bucket.ranks)
        if bucket.exchanged:
            for entry in bucket.entries:
                _add_entry(found[bucket.strategy], plan, entry, where, rates)
        elif not bucket.entries[0].homes:
            for entry in bucket.entries:
                _add_entry(found["sums"], plan, entry, where, rates)
            _add_sums(found["sums"], plan, bucket, where, rates)
    for strategy in {bucket.strategy: None for bucket in plan.buckets if bucket.exchanged}:
        _add_exchanges(found[strategy], plan, strategy, mesh, rates)
    for spec in plan.specs:
        if isinstance(
            spec.layout, Partition
        ):  # updated parameters are made whole again: every rank broadcasts its part
            loads = next(iter(found.values()))
            mine = spec.itemsize * np.diff(spec.layout.cuts)
            loads.sent = loads.sent + mine * (mesh.size - 1)
            loads.received = loads.received + mine.sum() - mine
            loads.wire = loads.wire + rates.link(spec.layout.ranks).seconds(float(mine.sum()), messages=0)
    return dict(found)


def _add_elementwise(loads: Loads, plan: GroupPlan, mesh: Mesh, rates: Rates) -> None:
    numel = sum(prod(spec.layout.shape) for spec in plan.specs)
    each = state_bytes(plan)[1] / max(numel, 1)  # padded codes aside, the same wherever an element lies
    agreed = agreement_bytes(plan)
    if agreed:
        loads.sent, loads.received = loads.sent + agreed, loads.received + agreed
        loads.wire = loads.wire + rates.all_reduce_seconds(range(mesh.size), agreed)
    for spec in plan.specs:
        geometry = geometry_of(spec.layout, logical_of(spec.layout.shape, plan.rule))
        here = geometry.counts.sum(0)[mesh.positions(spec.layout.ranks)]
        loads.matrices += geometry.logical.count
        loads.elements += prod(spec.layout.shape)
        loads.state = loads.state + each * here
        # Gradient and weight are read, the weight written; states both.
        loads.memory = loads.memory + rates.memory_seconds(1) * here * (3 * spec.itemsize + 2 * each)


def _add_entry(loads: Loads, plan: GroupPlan, entry: Entry, where: np.ndarray, rates: Rates) -> None:
    """States, computation and memory traffic of one matrix. `where` maps ranks to positions in its domain, which stand
    in ascending order, as those of layouts on a mesh do."""
    counts = {kind: found[entry.matrix] for kind, found in _extents(entry.geometry).items()}
    held, owned = lying_bytes(plan, entry, counts), owner_bytes(plan, entry.shape)
    moved = 2 * held + 3 * plan.specs[entry.param].itemsize * counts["like"]
    loads.matrices += 1
    loads.elements += entry.shape.numel
    loads.state = loads.state + held[where]
    loads.memory = loads.memory + rates.memory_seconds(1) * moved[where]
    short, long = sides(entry.shape)
    for home in entry.homes:
        own = where == home.rank
        loads.state = loads.state + owned * own
        loads.memory = loads.memory + rates.memory_seconds(2 * owned) * own
        if home.stop - home.start == long:
            loads.flops = loads.flops + sum(share * trace.flops for _, share, trace in plan.traces(entry.shape)) * own
            loads.compute = loads.compute + _by_step(plan, entry, rates)[:, None] * own
        else:
            (ask,) = next(plan.traces(entry.shape))[2].asks("through")
            assert ask.transform is not None
            work, _ = slice_work(ask.transform, short, home.stop - home.start)
            loads.flops = loads.flops + sum(work.values()) * own
            loads.compute = loads.compute + rates.compute_seconds(work) * own


def _by_step(plan: GroupPlan, entry: Entry, rates: Rates) -> np.ndarray:
    """Seconds that a matrix is computed in each step of a cycle."""
    rule, phases = plan.rule, plan.rule.phases().values()
    cycle = round(1 / min(share for _, share in phases if share))
    if not entry.turns:
        steps = [step for step, share in phases for _ in range(round(share * cycle))]
        traces = [trace(rule, entry.shape, step, plan.gpu) for step in steps]
    else:
        refresh = next(step for step, _ in phases if rule.due(step, 0))
        due = [[rule.due(refresh + i, turn) for turn in entry.turns] for i in range(cycle)]
        # Turn 0 is due at `refresh` and turn 1 is not: few traces serve all steps.
        traces = [trace(rule, entry.shape, refresh, plan.gpu, tuple(int(not d) for d in now)) for now in due]
    return np.array([rates.compute_seconds(dict(found.work)) for found in traces])


def _add_working(loads: Loads, plan: GroupPlan, entries: list[Entry], where: np.ndarray) -> None:
    """What matrices that are computed where they lie need: those of a bucket kept, one of them at work."""
    kept, bucket, extra = np.zeros((3, len(where)))
    for entry in entries:
        size = _footprint(plan, entry.shape)
        each = size.piece * entry.shape.numel + size.kept
        here = where == entry.owner
        kept += each * here
        bucket = np.maximum(bucket, each * max(1.0, BUCKET_BYTES / (4 * entry.shape.numel)) * here)
        extra = np.maximum(extra, (size.working - size.kept) * here)
    loads.temporary = np.maximum(loads.temporary, np.minimum(kept, bucket) + extra)


def _add_sums(loads: Loads, plan: GroupPlan, bucket: Bucket, where: np.ndarray, rates: Rates) -> None:
    """The all-reduces of one bucket, the same on all ranks of the domain."""
    pieces = np.zeros(len(bucket.ranks))
    for entry in bucket.entries:
        pieces += _footprint(plan, entry.shape).piece * entry.geometry.counts[entry.matrix]
    loads.temporary = np.maximum(loads.temporary, pieces[where])
    for asks in ordinary_rounds(plan, bucket.entries[0].shape):
        fields = [fields_of(bucket.entries, ask) for ask in asks if ask.scope != "optimizer"]
        reduced = 4 * sum(found.numel for by_shape in fields for found in by_shape.values())
        if reduced and len(bucket.ranks) > 1:
            loads.sent = loads.sent + reduced
            loads.received = loads.received + reduced
            loads.wire = loads.wire + rates.all_reduce_seconds(bucket.ranks, reduced)


def _add_exchanges(loads: Loads, plan: GroupPlan, strategy: str, mesh: Mesh, rates: Rates) -> None:
    """The all-to-alls to homes and back and between them, and what is alive meanwhile: pieces and buffers of the buckets
    in flight, matrices or slices and workspace of one."""
    in_flight, workspace = [], np.zeros(mesh.size)
    for bucket in (bucket for bucket in plan.buckets if bucket.strategy == strategy):
        where, link = mesh.positions(bucket.ranks), rates.link(bucket.ranks)
        pieces, kept, extra = np.zeros((3, len(bucket.ranks)))
        for entry in bucket.entries:
            size = _footprint(plan, entry.shape)
            short, long = sides(entry.shape)
            pieces += size.piece * entry.geometry.counts[entry.matrix]
            for home in entry.homes:
                # Gram matrices of slices are as large as those of whole matrices; the rest is as much less.
                share = (home.stop - home.start) / long
                kept[home.rank] += size.kept * share
                extra[home.rank] = max(extra[home.rank], (size.working - size.kept) * max(share, short / long))
        buffers = np.zeros(len(bucket.ranks))
        moved = travelling_elements(bucket)
        for ask in (ask for asks in ordinary_rounds(plan, bucket.entries[0].shape) for ask in asks):
            numbytes = asked_bytes(bucket, ask, moved)
            if numbytes is not None:
                sent, received = numbytes
                buffers = np.maximum(buffers, sent + received)
                loads.sent = loads.sent + sent[where]
                loads.received = loads.received + received[where]
                # A collective ends when its busiest rank is done.
                messages = 1 if ask.transform is None else 2 * len(slice_work(ask.transform, 1, 1)[1])
                loads.wire = loads.wire + link.seconds(float(np.maximum(sent, received).max()), messages)
        in_flight.append((pieces + buffers)[where])
        workspace = np.maximum(workspace, (kept + extra)[where])
    alive = [sum(in_flight[i : i + IN_FLIGHT]) for i in range(len(in_flight))]
    loads.temporary = np.maximum(loads.temporary, np.maximum.reduce(alive) + workspace)


def _footprint(plan: GroupPlan, shape: Shape) -> Footprint:
    """Of the step that holds on to most."""
    found = [footprint(plan.rule, shape, step, plan.gpu) for step, _ in plan.rule.phases().values()]
    return max(found, key=lambda size: size.working)


@lru_cache(maxsize=4096)
def _extents(geometry: Geometry) -> dict[str, np.ndarray]:
    """Elements of the state of each kind, (matrices, ranks)."""
    found = {kind: np.zeros(geometry.counts.shape) for kind in ("row", "col", "matrix")}
    for index in range(len(geometry.layout.ranks)):
        for matrix, rect in geometry.pieces(index):
            for kind, length in (("row", rect.r1 - rect.r0), ("col", rect.c1 - rect.c0), ("matrix", 1)):
                found[kind][matrix, index] += length
    return {"like": geometry.counts.astype(float), **found}
