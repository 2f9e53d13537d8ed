"""Flat ranges: elements [start, stop) of the row-major flattened tensor, cut anywhere (ZeRO 1/2/3, FSDP1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layouts.base import Layout, matrix_view
from distopt.layouts.region import Rect, flat_rects


@dataclass(frozen=True)
class Flat(Layout):
    """`ranks[i]` holds elements [starts[i], stops[i]) of the flattened tensor, contiguous."""

    starts: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()

    def rects(self, index: int, row_dims: int) -> list[Rect]:
        return flat_rects(matrix_view(self.shape, row_dims)[1], self.starts[index], self.stops[index])

    def describe(self) -> str:
        return f"flat range of {len(self.ranks)}"


@dataclass
class FlatShard:
    """What `flat_shard` leaves on the tensor. `ranges` holds every rank's (start, stop) once they have been exchanged."""

    shape: tuple[int, ...]
    start: int
    group: dist.ProcessGroup | None
    ranges: tuple[tuple[int, int], ...] | None = None


def flat_shard(
    local: Tensor, *, shape: tuple[int, ...], start: int, group: dist.ProcessGroup | None = None
) -> torch.nn.Parameter:
    """Declare a local 1-D tensor to be a range of a flattened logical tensor, cut at any offset.

    Args:
        local: elements [start, start + len(local)) of the row-major flattened tensor; shares storage with the result.
        shape: shape of the logical tensor.
        start: offset of the first element; any value where `local` is empty.
        group: the ranks that hold one copy of the tensor together (default: the default group). Every one of them
            must declare it, in the same order.

    Raises:
        ValueError: the range does not fit into the tensor.
    """
    total = matrix_view(tuple(shape), 0)[1]
    if local.ndim != 1 or (local.numel() and not 0 <= start <= total - local.numel()):
        raise ValueError(
            f"elements [{start}, {start + local.numel()}) of a flat shard do not fit a tensor of shape {tuple(shape)} "
            f"({total} elements); local must be 1-D, got {local.ndim}-D"
        )
    param = torch.nn.Parameter(local, requires_grad=local.is_floating_point())
    param._distopt_flat = FlatShard(tuple(shape), start if local.numel() else 0, group)  # type: ignore[attr-defined]
    return param


def flat_layout(param: Tensor) -> Flat | None:
    """The layout of a flat shard whose ranges have been exchanged; None for any other tensor."""
    spec: FlatShard | None = getattr(param, "_distopt_flat", None)
    if spec is None:
        return None
    assert spec.ranges is not None, "flat ranges are exchanged at bind"
    ranks = tuple(dist.get_process_group_ranks(spec.group or dist.group.WORLD)) if dist.is_initialized() else (0,)
    covered = 0
    for start, stop in sorted(spec.ranges):
        if start != covered and start != stop:
            raise ValueError(
                f"flat shards of a tensor of shape {spec.shape} leave a gap or overlap at element {covered}"
            )
        covered = max(covered, stop)
    if covered != matrix_view(spec.shape, 0)[1]:
        raise ValueError(f"flat shards of a tensor of shape {spec.shape} end at element {covered}")
    starts, stops = zip(*spec.ranges, strict=True)
    return Flat(spec.shape, ranks, starts, stops)
