"""Layouts: the map rank → regions of one parameter. One file per kind; they share one interface and one code path.

`layout_of(param)` reads a parameter as torch, or whoever cut it, left it. Layouts hold integers only: no tensor, no
process group, so that a plan can be made for a mesh that does not exist.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from distopt.layouts.base import Layout, Partition, Plain
from distopt.layouts.dtensor import Sharded, dtensor_layout, reshard
from distopt.layouts.flat import Flat, flat_layout, flat_shard
from distopt.layouts.fsdp1 import declare_fsdp1
from distopt.layouts.region import Rect

__all__ = [
    "Flat",
    "Layout",
    "Partition",
    "Plain",
    "Rect",
    "Sharded",
    "declare_fsdp1",
    "flat_shard",
    "global_shape",
    "layout_of",
    "local_tensor",
    "reshard",
]


def layout_of(param: Tensor, rank: int) -> Layout:
    """The layout of a parameter as it lies now.

    Args:
        param: plain tensor, DTensor of any mesh and placements, or a flat shard (`flat_shard`).
        rank: this process's global rank (0 without torch.distributed).

    Raises:
        ValueError: a placement that cannot be served (Partial).
    """
    if isinstance(param, DTensor):
        return dtensor_layout(param)
    return flat_layout(param) or Plain(tuple(param.shape), (rank,))


def global_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the logical tensor, whatever part of it lies here."""
    spec = getattr(tensor, "_distopt_flat", None)
    return tuple(tensor.shape if spec is None else spec.shape)


def local_tensor(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, or the tensor itself; never part of autograd."""
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()
