"""Builders of every layout: full tensors in, the same model as sharded parameters out.

A layout is one function `place(full) -> parameters`, run by every rank, that cuts a dict of full tensors (identical on
all ranks) as torch, or a trainer, does. Everything else is made from it: `lay_out` runs it twice, once on tensors that
hold their own element numbers, which tells which elements of which tensor lie on this rank, whatever cut them. Setting
gradients, gathering and comparing therefore know no layout, and share no code with the package's own layouts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from distopt.layouts import flat_shard

Full = dict[str, Tensor]

# Uneven over 2 and over 4 ranks, shards that are empty, one row, one column, more than 4,096 elements, nothing at all.
# All shapes differ, also after transposition, so that no two matrices are batched.
DISTINCT = {
    "tall": (37, 16),
    "wide": (18, 130),
    "square": (24, 24),
    "few_rows": (3, 20),
    "row": (1, 40),
    "column": (50, 1),
    "large": (72, 64),
    "norm": (33,),
    "short": (2,),
    "empty": (0, 8),
}
# The linear layers of two blocks, two of each shape; TP cuts some of them unevenly, FSDP2 then cuts uneven pieces.
BLOCKS = {
    "q": (18, 24),
    "out": (24, 18),
    "up": (50, 24),
    "down": (24, 50),
    "up_again": (50, 24),
    "down_again": (24, 50),
    "router": (6, 24),
    "norm": (24,),
    "norm_again": (24,),
}
EXPERTS = {"experts": (5, 12, 8), "few_experts": (2, 8, 12), "dense": (24, 20), "norm": (33,)}


@dataclass(frozen=True)
class Layout:
    """One way to lay a model out.

    Attributes:
        place: Cuts full tensors into this rank's parameters; may leave out parameters that lie on other ranks only.
        world_sizes: Numbers of ranks it exists for.
        shapes: The model, by name.
        options: Makes the optimizer options that go with the layout; called on every rank.
        is_sharded: Whether ranks hold different elements.
    """

    place: Callable[[Full], Full]
    world_sizes: tuple[int, ...] = (2, 4)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: DISTINCT)
    options: Callable[[], dict[str, Any]] = dict
    is_sharded: bool = True

    @property
    def has_repeated_shapes(self) -> bool:
        """Whether several logical matrices have one shape, so that the engine may batch them."""
        return self.shapes is not DISTINCT


@dataclass(frozen=True)
class Laid:
    """A model laid out on this rank.

    Attributes:
        params: The parameters, by name.
        elements: For each of them, the positions of the local elements in the flattened full tensor.
    """

    params: Full
    elements: Full

    def named(self) -> list[tuple[str, Tensor]]:
        """What an optimizer takes."""
        return list(self.params.items())

    def set_grads(self, full_grads: dict[str, Tensor | None]) -> None:
        """Give every parameter its piece of a full gradient; None takes the gradient away."""
        for name, param in self.params.items():
            grad = full_grads[name]
            param.grad = None if grad is None else self._cut(name, grad)

    def local(self, name: str, full: Tensor) -> Tensor:
        """The piece of a full tensor that lies where the local piece of this parameter does."""
        return full.flatten()[self.elements[name]].reshape(local_tensor(self.params[name]).shape)

    def gather(self, shapes: dict[str, tuple[int, ...]]) -> Full:
        """The full values of all parameters, on every rank; collective over the default group.

        Raises:
            AssertionError: Replicas differ, or an element lies on no rank.
        """
        mine = {name: (self.elements[name], local_tensor(p).detach().flatten()) for name, p in self.params.items()}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        full: Full = {}
        for name, shape in shapes.items():
            pieces = [rank[name] for rank in everyone if name in rank]
            flat = torch.full(shape, torch.nan, dtype=pieces[0][1].dtype).flatten()
            for elements, values in pieces:
                flat[elements] = values
            assert all(torch.equal(flat[elements], values) for elements, values in pieces), f"{name}: replicas differ"
            assert not flat.isnan().any(), f"{name}: not a number, or on no rank"
            full[name] = flat.reshape(shape)
        return full

    def _cut(self, name: str, full: Tensor) -> Tensor:
        piece, param = self.local(name, full), self.params[name]
        if not isinstance(param, DTensor):
            return piece
        return DTensor.from_local(
            piece, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )


def lay_out(layout: Layout, full: Full) -> Laid:
    """Lay full tensors out on this rank; collective."""
    numbers = {n: torch.arange(t.numel(), dtype=torch.float64).reshape(t.shape) for n, t in full.items()}
    elements = {name: local_tensor(p).detach().flatten().long() for name, p in layout.place(numbers).items()}
    return Laid(layout.place({name: tensor.clone() for name, tensor in full.items()}), elements)


def local_tensor(param: Tensor) -> Tensor:
    """The part of a parameter that lies on this rank."""
    return param.to_local() if isinstance(param, DTensor) else param


@cache
def mesh(*axes: tuple[str, int]) -> DeviceMesh:
    """A mesh of all ranks, made once per process: its groups hold sockets and threads as long as the process lives."""
    names, sizes = zip(*axes)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def ranks_mesh() -> DeviceMesh:
    """All ranks along one axis."""
    return mesh(("dp", dist.get_world_size()))


def replicated(full: Full) -> Full:
    """Plain tensors, whole on every rank, as under DDP."""
    return {name: nn.Parameter(tensor) for name, tensor in full.items()}


def distributed(*placements: Placement) -> Callable[[Full], Full]:
    """`distribute_tensor` on a 1-D mesh; a dim that a tensor does not have becomes its last one."""

    def place(full: Full) -> Full:
        return {
            name: nn.Parameter(
                distribute_tensor(
                    tensor,
                    ranks_mesh(),
                    [Shard(min(p.dim, tensor.ndim - 1)) if isinstance(p, Shard) else p for p in placements],
                )
            )
            for name, tensor in full.items()
        }

    return place


class Model(nn.Module):
    """The tensors as the weights of modules that torch's wrappers know: linear layers, and a holder for the others."""

    def __init__(self, full: Full) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, tensor in full.items():
            layer = nn.Module() if tensor.ndim != 2 else nn.Linear(1, 1, bias=False)
            layer.weight = nn.Parameter(tensor)
            self.layers[name] = layer

    def weights(self) -> Full:
        """The parameters as they are now."""
        return {name: layer.get_parameter("weight") for name, layer in self.layers.items()}


def fsdp(mesh_of: Callable[[], DeviceMesh]) -> Callable[[Full], Full]:
    """FSDP2 on a real module; a 2-D mesh makes it HSDP."""

    def place(full: Full) -> Full:
        model = Model(full)
        fully_shard(model, mesh=mesh_of())
        return model.weights()

    return place


def tensor_parallel(model: Model, tp: DeviceMesh) -> None:
    """The first linear layers of a block column-wise, the second ones row-wise; router and norms stay as they are."""
    columns, rows = ("q", "up", "up_again"), ("out", "down", "down_again")
    linear = {name for name, layer in model.layers.items() if isinstance(layer, nn.Linear)}
    styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns if name in linear}
    styles |= {name: RowwiseParallel() for name in rows if name in linear}
    parallelize_module(model, tp, {f"layers.{name}": style for name, style in styles.items()})


def tp(full: Full) -> Full:
    """Tensor parallel over all ranks; norms and router are plain replicated tensors beside DTensors."""
    model = Model(full)
    tensor_parallel(model, mesh(("tp", dist.get_world_size())))
    return model.weights()


def fsdp_tp(full: Full) -> Full:
    """FSDP2 over TP, 2 × 2: strided shards for column-wise weights; norms and router on the 1-D data-parallel mesh."""
    both = mesh(("dp", 2), ("tp", 2))
    model = Model(full)
    tensor_parallel(model, both["tp"])
    fully_shard(model, mesh=both["dp"])
    return model.weights()


def experts(full: Full) -> Full:
    """Expert parallel over all ranks, whole experts per rank; dense parameters under FSDP2's placements."""
    return distributed(Shard(0))(full)


def experts_fsdp(full: Full) -> Full:
    """Experts on a 2 × 2 mesh: dim 0 over the expert axis, dim 1 over the data-parallel axis; dense ones over both."""
    both = mesh(("dp", 2), ("ep", 2))
    sharded = distributed(Shard(0))
    return {
        name: nn.Parameter(distribute_tensor(tensor, both, [Shard(1), Shard(0)]))
        if tensor.ndim == 3
        else sharded({name: tensor})[name]
        for name, tensor in full.items()
    }


def pipeline(full: Full) -> Full:
    """Two stages, each with every second parameter; a stage of two ranks is sharded over them."""
    size = dist.get_world_size() // 2
    both = mesh(("pp", 2), ("dp", size))
    stage = dist.get_rank() // size
    mine = {name: tensor for i, (name, tensor) in enumerate(full.items()) if i % 2 == stage}
    if size == 1:
        return replicated(mine)
    return {name: nn.Parameter(distribute_tensor(tensor, both["dp"], [Shard(0)])) for name, tensor in mine.items()}


def flat_uneven(full: Full) -> Full:
    """Every tensor flattened and cut at arbitrary offsets, in the middle of rows, with one rank left empty."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params: Full = {}
    for number, (name, tensor) in enumerate(full.items()):
        shares = [
            0.0 if rank == number % world_size else 1 + ((7 * rank + 3 * number) % 5) for rank in range(world_size)
        ]
        ends = [round(tensor.numel() * share / sum(shares)) for share in accumulate(shares)]
        start, stop = list(pairwise([0, *ends]))[rank]
        params[name] = flat_range(tensor, start, stop)
    return params


def flat_concatenated(full: Full) -> Full:
    """All tensors concatenated and cut into equal parts, as ZeRO does: most ranks hold nothing of most tensors."""
    total = sum(tensor.numel() for tensor in full.values())
    part = -(-total // dist.get_world_size())
    first = dist.get_rank() * part
    params: Full = {}
    offset = 0
    for name, tensor in full.items():
        start, stop = (min(max(first + edge - offset, 0), tensor.numel()) for edge in (0, part))
        params[name] = flat_range(tensor, start, stop)
        offset += tensor.numel()
    return params


def flat_range(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a flattened tensor, declared to the package as such."""
    local = tensor.flatten()[start:stop].clone()
    return flat_shard(local, shape=tuple(tensor.shape), start=start, group=dist.group.WORLD)


def over_replicas() -> dict[str, Any]:
    """The option that partitions the states of replicated tensors."""
    return {"process_group": dist.group.WORLD}


LAYOUTS = {
    "replicated": Layout(replicated, is_sharded=False),
    "replicated-repeated": Layout(replicated, shapes=BLOCKS, is_sharded=False),
    "partitioned": Layout(replicated, options=over_replicas, is_sharded=False),
    "partitioned-repeated": Layout(replicated, shapes=BLOCKS, options=over_replicas, is_sharded=False),
    "distributed": Layout(distributed(Shard(0))),
    "distributed-replicate": Layout(distributed(Replicate()), is_sharded=False),
    "fsdp": Layout(fsdp(ranks_mesh)),
    "fsdp-repeated": Layout(fsdp(ranks_mesh), shapes=BLOCKS),
    "hsdp": Layout(fsdp(lambda: mesh(("replicate", 2), ("shard", 2))), world_sizes=(4,)),
    "tp": Layout(tp, shapes=BLOCKS),
    "fsdp-tp": Layout(fsdp_tp, world_sizes=(4,), shapes=BLOCKS),
    "columns": Layout(distributed(Shard(1))),
    "experts": Layout(experts, shapes=EXPERTS),
    "experts-fsdp": Layout(experts_fsdp, world_sizes=(4,), shapes=EXPERTS),
    "pipeline": Layout(pipeline, options=lambda: {"norm_group": dist.group.WORLD}),
    "flat": Layout(flat_uneven),
    "flat-concatenated": Layout(flat_concatenated),
    "flat-experts": Layout(flat_uneven, shapes=EXPERTS),
}
