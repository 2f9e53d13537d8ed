"""DTensor layouts on any mesh: FSDP2, HSDP, tensor parallel, FSDP2×TP with strided shards, expert parallel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from distopt.layouts.base import Layout
from distopt.layouts.region import Rect, box_rects, chunk


@dataclass(frozen=True)
class Axis:
    """One mesh axis that shards a tensor dim into `size` chunks; `strided` axes cut within what plain ones left."""

    size: int
    dim: int
    strided: bool = False


@dataclass(frozen=True)
class Sharded(Layout):
    """A tensor cut along mesh axes. `ranks` is row-major over `axes`, which lists the sharding axes only."""

    axes: tuple[Axis, ...] = ()

    def box(self, index: int) -> tuple[tuple[int, int], ...]:
        """The hyper-rectangle of `ranks[index]`, one interval per dim.

        torch chunks by the plain shards first and by the strided ones within the result; its own
        compute_local_shape_and_global_offset disagrees with FSDP2's chunking on uneven dims, so this does not use it.
        """
        coordinate: list[int] = []
        for axis in reversed(self.axes):
            index, position = divmod(index, axis.size)
            coordinate.insert(0, position)
        box = [(0, size) for size in self.shape]
        for axis, position in sorted(zip(self.axes, coordinate, strict=True), key=lambda pair: pair[0].strided):
            start, stop = box[axis.dim]
            low, high = chunk(stop - start, axis.size, position)
            box[axis.dim] = (start + low, start + high)
        return tuple(box)

    def rects(self, index: int, row_dims: int) -> list[Rect]:
        return box_rects(self.shape, self.box(index), row_dims)

    def local_shape(self, index: int) -> tuple[int, ...]:
        """The shape of the local tensor of `ranks[index]`."""
        return tuple(stop - start for start, stop in self.box(index))

    def describe(self) -> str:
        words = [f"{'StridedShard' if axis.strided else 'Shard'}({axis.dim})/{axis.size}" for axis in self.axes]
        return "×".join(words) or "replicated"


def dtensor_layout(param: DTensor) -> Sharded:
    """Read the placements of a DTensor.

    Raises:
        ValueError: a Partial or unknown placement; such a value is not a parameter.
    """
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this rank is not part of the parameter's mesh {mesh}")
    ranks = mesh.mesh
    axes: list[Axis] = []
    for axis_index in reversed(range(mesh.ndim)):
        placement = param.placements[axis_index]
        if isinstance(placement, Replicate):
            ranks = ranks.select(axis_index, coordinate[axis_index])
        elif isinstance(placement, Shard | _StridedShard):
            dim = placement.dim % param.ndim
            axes.insert(0, Axis(mesh.size(axis_index), dim, isinstance(placement, _StridedShard)))
        else:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} has placement {placement}; optimizers need Shard or Replicate, "
                "redistribute it first"
            )
    layout = Sharded(tuple(param.shape), tuple(ranks.flatten().tolist()), tuple(axes))
    assert len(layout.ranks) == prod(axis.size for axis in axes)
    index = layout.ranks.index(mesh.mesh[tuple(coordinate)].item())
    local = tuple(param._local_tensor.shape)
    # Empty shards may be recorded with another empty shape.
    if layout.local_shape(index) != local and prod(local) + prod(layout.local_shape(index)) > 0:
        raise ValueError(
            f"a DTensor of shape {layout.shape} with placements {param.placements} holds a local shard of shape {local}, "
            f"expected {layout.local_shape(index)}: it was not chunked as torch.chunk does"
        )
    return layout


def reshard(model: nn.Module) -> None:
    """Let FSDP2 show its sharded parameters again: after a forward without a backward it shows gathered ones."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
