"""What ranks find out about each other at bind: flat ranges, the ranks of meshes, and whether all believe the same."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distopt.comm.groups import Domain


def agree(words: list[str], union: Domain, rank: int, device: torch.device) -> None:
    """Compare what every rank of the union believes, entry by entry, before anything else is said.

    Raises:
        ValueError: ranks differ; says who and where.
    """
    if union.size == 1:
        return
    digests = [_digest(word) for word in words]
    counts = union.all_gather_ints([len(words), _digest("\n".join(words))], device)
    if len({tuple(count) for count in counts}) == 1:
        return
    if len({count[0] for count in counts}) > 1:
        raise ValueError(
            "ranks disagree about the number of parameters and groups together: "
            + ", ".join(f"rank {rank} has {count[0]}" for rank, count in zip(union.ranks, counts))
        )
    table = union.all_gather_ints(digests, device)
    for position, word in enumerate(words):
        values = [row[position] for row in table]
        if len(set(values)) > 1:
            odd = [rank for rank, value in zip(union.ranks, values) if value != values[0]]
            raise ValueError(
                f"ranks disagree: rank {union.ranks[0]} and ranks {odd} differ in entry {position}, which is "
                f"{word!r} on rank {rank}. Every rank must build the same optimizer"
            )


def exchange_flat_ranges(names: list[str], params: list[Tensor], device: torch.device) -> None:
    """Let all ranks of each group know each other's flat ranges: one small gather per group.

    Raises:
        ValueError: ranks declare different tensors, or in another order.
    """
    by_group: dict[Any, list[Any]] = defaultdict(list)
    for name, param in zip(names, params):
        spec = getattr(param, "_distopt_flat", None)
        if spec is not None and spec.ranges is None:
            by_group[spec.group].append((spec, param.numel(), f"{name}|{spec.shape}"))
    for group, members in by_group.items():
        mine = [number for spec, numel, _ in members for number in (spec.start, spec.start + numel)]
        described = _digest("\n".join(word for _, _, word in members))
        table = [mine]
        if dist.is_initialized():
            ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
            if len(ranks) > 1:
                domain = Domain(ranks, ranks.index(dist.get_rank()), group or dist.group.WORLD)
                if len({tuple(row) for row in domain.all_gather_ints([len(mine), described], device)}) > 1:
                    raise ValueError(
                        "ranks disagree about the number, names, order or shapes of flat shards; every rank of the group "
                        "must declare every tensor, in the same order"
                    )
                table = domain.all_gather_ints(mine, device)
        for i, (spec, _, _) in enumerate(members):
            spec.ranges = tuple((row[2 * i], row[2 * i + 1]) for row in table)


def mesh_ranks(params: list[Tensor], rank: int) -> set[int]:
    """The ranks of a rank's slice of the mesh that the parameters' meshes span together."""
    found: set[int] = set()
    meshes = {param.device_mesh for param in params if isinstance(param, DTensor)}
    for root in {mesh._get_root_mesh() for mesh in meshes}:
        ranks = root.mesh
        mine = (ranks == rank).nonzero()[0]
        members = {r for mesh in meshes if mesh._get_root_mesh() is root for r in mesh.mesh.flatten().tolist()}
        spanned = [
            axis
            for axis in range(ranks.ndim)
            if any(int((ranks == member).nonzero()[0][axis]) != int(mine[axis]) for member in members)
        ]
        index = tuple(slice(None) if axis in spanned else int(mine[axis]) for axis in range(ranks.ndim))
        found |= set(ranks[index].flatten().tolist())
    return found


def known_groups(params: list[Tensor], engine: dict[str, Any]) -> list[dist.ProcessGroup]:
    """The process groups that meshes, flat ranges and options bring along."""
    meshes = {param.device_mesh for param in params if isinstance(param, DTensor)}
    groups = [mesh.get_group(axis) for mesh in meshes for axis in range(mesh.ndim)]
    groups += [p._distopt_flat.group for p in params if getattr(p, "_distopt_flat", None) and p._distopt_flat.group]  # type: ignore[attr-defined]
    return groups + [engine[key] for key in ("process_group", "norm_group") if engine[key] is not None]


def ranks_of(group: dist.ProcessGroup | None) -> tuple[int, ...] | None:
    """The ranks of a group, ascending."""
    return None if group is None else tuple(sorted(dist.get_process_group_ranks(group)))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def jsonable(values: dict[str, Any]) -> str:
    """Options as text, the same on every rank that has the same."""
    return json.dumps(values, sort_keys=True, default=str)
