"""What a plan costs, as a dict and as text."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from distopt.plan.buckets import Bucket, GroupPlan
from distopt.plan.fields import fields_of
from distopt.plan.held import agreement_bytes, state_bytes
from distopt.plan.hosting import STEPPED
from distopt.plan.pages import SLOTS, device_bytes, paging, slot_bytes
from distopt.plan.strategies import held, sides, slice_work
from distopt.plan.trace import Ask, Rounds
from distopt.rule import Shape


class PlanReport:
    """The plans of all groups of an optimizer, for one rank.

    Bytes are what this rank hands to collectives and gets from them in one ordinary step, as `optimizer.traffic()`
    counts them: the exchange there and back, sums, the gathering of partitioned parameters, and the verdict
    (`verdict_bytes`, either way).
    """

    def __init__(self, groups: list[GroupPlan], names: list[str], rank: int, verdict_bytes: int = 0) -> None:
        self.groups, self.names, self.rank, self.verdict_bytes = groups, names, rank, verdict_bytes

    def summary(self) -> dict[str, Any]:
        """Totals and one record per group.

        Returns:
            bytes_sent_per_step, bytes_received_per_step: this rank's, in an ordinary step.
            busiest_bytes, mean_bytes: over the ranks, the larger of sent and received, for exchanged matrices.
            state_bytes, state_bytes_total: on this rank, and of one process that held everything.
            state_bytes_per_parameter: state_bytes_total per element.
            device_state_bytes: what states take on the device here, slots included; state_bytes where nothing is paged.
            paged_bytes: by tier ("device", "cpu", "cpu_step", "disk:…"), bytes of pages here.
            offload_seconds: per group, of what elementwise rules keep in host memory: seconds per step by the cost model where
                its "pages" move and where it is stepped there ("cpu_step"); "elements", and how many of them are "stepped".
            page_bytes_read_per_step, page_bytes_written_per_step: of pages that move, in an ordinary step, as
                `optimizer.traffic()` counts them.
            flops, flops_imbalance: matrix FLOPs per step on this rank; the busiest rank's over the mean.
            parameters, matrices, groups.
        """
        groups = [self._group(name, plan) for name, plan in zip(self.names, self.groups)]
        out: dict[str, Any] = {
            key: sum(group[key] for group in groups)
            for key in (
                "bytes_sent_per_step", "bytes_received_per_step", "state_bytes", "state_bytes_total", "parameters",
                "elements", "matrices", "flops", "page_bytes_read_per_step", "page_bytes_written_per_step",
            )
        }  # fmt: skip
        out["device_state_bytes"] = device_bytes(self.groups)
        tiers = [(tier, size) for group in groups for tier, size in group["paged_bytes"].items()]
        out["paged_bytes"] = {name: sum(size for tier, size in tiers if tier == name) for name, _ in tiers}
        out["bytes_sent_per_step"] += self.verdict_bytes
        out["bytes_received_per_step"] += self.verdict_bytes
        loads: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(1))
        for plan in self.groups:
            for ranks, load in plan.loads.items():
                loads[ranks] = loads[ranks] + load
        out["flops_imbalance"] = max(
            (float(load.max() / load.mean()) for load in loads.values() if load.any()), default=1.0
        )
        traffic = [exchanged_bytes(plan) for plan in self.groups]
        totals: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros((1, 1)))
        for by_domain in traffic:
            for ranks, value in by_domain.items():
                totals[ranks] = totals[ranks] + value
        busiest = max((value.max() for value in totals.values()), default=0)
        out["busiest_bytes"] = int(busiest)
        out["mean_bytes"] = float(max((value.max(0).mean() for value in totals.values()), default=0.0))
        out["state_bytes_per_parameter"] = out["state_bytes_total"] / max(out["elements"], 1)
        out["groups"] = groups
        return out

    def explain(self) -> str:
        """A table for people: per group and bucket what is computed where, and what moves."""
        lines = []
        for name, plan in zip(self.names, self.groups):
            group = self._group(name, plan)
            lines.append(
                f"group {name}: {type(plan.rule).__name__} on {group['parameters']} parameters ({group['elements']:,} elements), "
                f"state {_size(group['state_bytes'])} here, {_size(group['state_bytes_total'])} in all"
            )
            layouts: dict[str, int] = defaultdict(int)
            for spec in plan.specs:
                layouts[spec.layout.describe()] += 1
            lines.append("  layouts: " + ", ".join(f"{count} × {words}" for words, count in layouts.items()))
            for number, bucket in enumerate(plan.buckets):
                sent, received = bucket_bytes(plan, bucket, self.rank)
                lines.append(
                    f"  bucket {number}: {len(bucket.entries)} matrices, {_how(bucket)}; "
                    f"sends {_size(sent)}, receives {_size(received)}"
                )
            if group["paged_bytes"]:
                lines.append(
                    "  pages: "
                    + ", ".join(f"{_size(size)} on {tier}" for tier, size in group["paged_bytes"].items())
                    + f"; per step {_size(group['page_bytes_read_per_step'])} to the device and "
                    f"{_size(group['page_bytes_written_per_step'])} back, through {SLOTS} slots of "
                    + _size(slot_bytes(self.groups))
                )
            lines += _where_stepped(group["offload_seconds"])
            for load in plan.loads.values():
                if load.any():
                    lines.append(
                        f"  FLOPs per step: busiest rank {load.max():.3g}, mean {load.mean():.3g}, "
                        f"imbalance {load.max() / load.mean():.3f}"
                    )
        return "\n".join(lines)

    def _group(self, name: str, plan: GroupPlan) -> dict[str, Any]:
        sent = received = 0
        for bucket in plan.buckets:
            moved = bucket_bytes(plan, bucket, self.rank)
            sent, received = sent + moved[0], received + moved[1]
        gathered = gather_bytes(plan)
        agreed = agreement_bytes(plan)
        here, total = state_bytes(plan)
        loads = [(load, ranks) for ranks, load in plan.loads.items()]
        return {
            "name": name,
            "rule": type(plan.rule).__name__,
            "parameters": len(plan.specs),
            "elements": sum(int(np.prod(spec.layout.shape, dtype=np.int64)) for spec in plan.specs),
            "matrices": sum(len(bucket.entries) for bucket in plan.buckets),
            "buckets": len(plan.buckets),
            "strategies": _strategies(plan),
            "bytes_sent_per_step": sent + gathered[0] + agreed,
            "bytes_received_per_step": received + gathered[1] + agreed,
            "state_bytes": here,
            "state_bytes_total": total,
            **paging(plan),
            "flops": float(sum(load[ranks.index(self.rank)] for load, ranks in loads)),
        }


def _where_stepped(found: dict[str, Any]) -> list[str]:
    """What the cost model says of states in host memory, and what was taken."""
    if not found["elements"]:
        return []
    return [
        f"  states in host memory: {found['stepped']:,} of {found['elements']:,} elements are stepped there; by the cost model "
        f"moving all of their pages takes {1e3 * found['pages']:.3g} ms per step, stepping all of them there "
        f"{1e3 * found[STEPPED]:.3g} ms"
    ]


def _strategies(plan: GroupPlan) -> dict[str, int]:
    """How many matrices of this rank's buckets are computed in which way."""
    found: dict[str, int] = defaultdict(int)
    for bucket in plan.buckets:
        found[bucket.strategy] += len(bucket.entries)
    return dict(found)


def ordinary_rounds(plan: GroupPlan, shape: Shape) -> Rounds:
    """The rounds of the commonest phase."""
    return max(plan.traces(shape), key=lambda item: item[1])[2].rounds


def bucket_bytes(plan: GroupPlan, bucket: Bucket, rank: int) -> tuple[int, int]:
    """(sent, received) by this rank for one bucket in an ordinary step."""
    sent = received = 0
    out, into = _moved_elements(plan, bucket, rank) if bucket.exchanged else (0, 0)
    for asks in ordinary_rounds(plan, bucket.entries[0].shape):
        for ask in asks:
            if ask.kind == "whole":
                sent, received = sent + out * ask.dtype.itemsize, received + into * ask.dtype.itemsize
            elif ask.kind == "back" and bucket.strategy != "gather":
                sent, received = sent + into * ask.dtype.itemsize, received + out * ask.dtype.itemsize
            elif ask.kind == "through" and bucket.sliced:
                summed = int(summed_bytes(bucket, ask)[bucket.ranks.index(rank)])
                sent, received = sent + summed, received + summed
            elif ask.kind in ("sum", "mean", "max") and len(bucket.ranks) > 1 and ask.scope != "optimizer":
                reduced = 4 * sum(field.numel for field in fields_of(bucket.entries, ask).values())
                sent, received = sent + reduced, received + reduced
    return sent, received


def _moved_elements(plan: GroupPlan, bucket: Bucket, rank: int) -> tuple[int, int]:
    me = bucket.ranks.index(rank)
    sent = received = 0
    for entry in bucket.entries:
        here = held(entry.geometry, entry.matrix, entry.cuts)[plan.specs[entry.param].index]
        short, _ = sides(entry.shape)
        for home, elements in zip(entry.homes, here.tolist()):
            if home.rank == me:
                received += short * (home.stop - home.start) - elements
            else:
                sent += elements
    return sent, received


def summed_bytes(bucket: Bucket, ask: Ask) -> np.ndarray:
    """Bytes per rank that homes send, and receive, for the sums of one request."""
    assert ask.transform is not None
    found = np.zeros(len(bucket.ranks))
    for entry in bucket.entries:
        short, _ = sides(entry.shape)
        for payload in slice_work(ask.transform, short, 1)[1]:
            for index, home in enumerate(entry.homes):
                found[home.rank] += payload.moved(len(entry.homes), index) * payload.dtype.itemsize
    return found


def travelling_elements(bucket: Bucket) -> np.ndarray:
    """Elements that each rank sends to homes, and those that it receives as one: (2, ranks). Back it is the reverse, but
    for matrices that everybody gathers."""
    moved = np.zeros((2, len(bucket.ranks)))
    order: dict[tuple[int, ...], np.ndarray] = {}
    for entry in bucket.entries:
        ranks = entry.geometry.layout.ranks
        if ranks not in order:
            order[ranks] = np.searchsorted(np.asarray(bucket.ranks), np.asarray(ranks))
        counts = held(entry.geometry, entry.matrix, entry.cuts)
        moved[0, order[ranks]] += counts.sum(1)
        for number, home in enumerate(entry.homes):
            own = counts[np.flatnonzero(order[ranks] == home.rank)[0], number]
            moved[0, home.rank] -= own
            moved[1, home.rank] += counts[:, number].sum() - own
    return moved


def asked_bytes(bucket: Bucket, ask: Ask, moved: np.ndarray) -> np.ndarray | None:
    """Bytes per rank that one request of a bucket with homes sends and receives, (2, ranks), of `travelling_elements`;
    None where nothing travels for it."""
    if ask.kind == "whole" and bucket.travels:
        return moved * ask.dtype.itemsize
    if ask.kind == "back" and bucket.travels and bucket.strategy != "gather":
        return moved[::-1] * ask.dtype.itemsize
    if ask.kind == "through" and bucket.sliced:
        return np.tile(summed_bytes(bucket, ask), (2, 1))
    return None


def exchanged_bytes(plan: GroupPlan) -> dict[tuple[int, ...], np.ndarray]:
    """Per domain, bytes per rank of the exchanges of an ordinary step, there and back, and of the sums over homes: array
    (2, ranks) of sent and received."""
    found: dict[tuple[int, ...], np.ndarray] = {}
    for bucket in plan.buckets:
        if bucket.exchanged:
            moved = travelling_elements(bucket)
            value = np.zeros_like(moved)
            for asks in ordinary_rounds(plan, bucket.entries[0].shape):
                for ask in asks:
                    value += 0 if (numbytes := asked_bytes(bucket, ask, moved)) is None else numbytes
            found[bucket.ranks] = found.get(bucket.ranks, 0) + value
    return found


def _how(bucket: Bucket) -> str:
    """A strategy in words."""
    here, ranks = sum(len(owned.entries) for owned in bucket.owned), len(bucket.ranks)
    most = max((len(entry.homes) for entry in bucket.entries), default=1)
    return {
        "in place": f"in place, {len({p.entry for s in bucket.stacks for p in s.pieces})} here",
        "owner": f"owner through all-to-all over {ranks} ranks, {here} here",
        "gather": f"gather: all of them on each of {ranks} ranks",
        "gram": f"gram: slices where they lie, Gram matrices summed over up to {most} ranks, {here} slices here",
        "split": f"split: equal slices, Gram matrices summed over up to {most} of {ranks} ranks, {here} slices here",
    }[bucket.strategy]


def gather_bytes(plan: GroupPlan) -> tuple[int, int]:
    """(sent, received) by this rank to make parameters that are partitioned over replicas whole again."""
    sent = received = 0
    for spec in plan.specs:
        cuts = getattr(spec.layout, "cuts", None)
        if cuts:
            mine = cuts[spec.index + 1] - cuts[spec.index]
            sent += spec.itemsize * mine * (len(cuts) - 2)
            received += spec.itemsize * (cuts[-1] - mine)
    return sent, received


def _size(numbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if numbytes < 1024:
            return f"{numbytes:.4g} {unit}"
        numbytes /= 1024
    return f"{numbytes:.4g} TiB"
