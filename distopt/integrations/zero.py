"""Where DeepSpeed's ZeRO puts the pieces of parameters, read off what it leaves on them. Every fact here is DeepSpeed's;
`distopt.integrations.deepspeed` compares the result with the weights before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from distopt.layouts.flat import FlatShard

Members = list[tuple[str, Tensor]]
"""Names and parameters of a group, as they were before DeepSpeed replaced them."""


@dataclass
class Cut:
    """A piece of a parameter: elements [start, start + numel) of it lie at `offset` of DeepSpeed's fp32 partition."""

    name: str
    param: Tensor
    start: int
    offset: int
    numel: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's, when it is whole."""
        return tuple(getattr(self.param, "ds_shape", self.param.shape))

    def weights(self) -> Tensor:
        """The same elements in the model's own copy and precision."""
        if hasattr(self.param, "ds_tensor"):
            return self.param.ds_tensor.detach().view(-1)[: self.numel]
        return self.param.detach().view(-1)[self.start : self.start + self.numel]


def is_partitioned(param: Tensor) -> bool:
    """Whether stage 1, 2 or 3 took this parameter apart."""
    return hasattr(param, "ds_id") or hasattr(param, "_dp_group")


def cuts_of(flat: Tensor, members: Members) -> tuple[list[Cut], dist.ProcessGroup]:
    """The pieces in a flat partition, in the order of `members` on every rank (empty ones too), and the ranks that hold
    the rest of them.

    Raises:
        ValueError: an option that moves partitions or replaces the optimizer.
    """
    return _stage3_cuts(flat, members) if hasattr(members[0][1], "ds_id") else _stage12_cuts(flat, members)


def _stage12_cuts(flat: Tensor, members: Members) -> tuple[list[Cut], dist.ProcessGroup]:
    """Parameters lie behind each other in one buffer, of which each rank has an equal part in fp32.

    Where a parameter begins is read off the storage that it shares with the others; `_hp_mapping`, DeepSpeed's own
    account, is wrong under round_robin_gradients.
    """
    group: dist.ProcessGroup = members[0][1]._dp_group  # type: ignore[attr-defined]
    base = min(param.storage_offset() for _, param in members)
    low = dist.get_rank(group) * flat.numel()
    cuts = []
    for name, param in members:
        begin = int(param.storage_offset()) - int(base) - low  # in this partition, if it is not cut
        start = min(max(-begin, 0), param.numel())
        stop = max(min(flat.numel() - begin, param.numel()), start)
        cuts.append(Cut(name, param, start, max(begin, 0) if stop > start else 0, stop - start))
    return cuts, group


def _stage3_cuts(flat: Tensor, members: Members) -> tuple[list[Cut], dist.ProcessGroup]:
    """Every parameter is cut into equal parts, the last ones padded; a sub-group's parts lie behind each other."""
    zero: Any = members[0][1]._z3_optimizer  # type: ignore[attr-defined]
    _check_stage3(zero)
    (number,) = [i for i, other in enumerate(zero.fp32_partitioned_groups_flat) if other is flat]
    group: dist.ProcessGroup = members[0][1].ds_process_group  # type: ignore[attr-defined]
    cuts = []
    for name, param in members:
        sub_group, offset, size = zero.grad_position[zero.get_param_id(param)]
        if sub_group != number:
            continue
        start = min(dist.get_rank(group) * size, param.ds_numel)  # type: ignore[attr-defined]
        numel = min(size, param.ds_numel - start)  # type: ignore[attr-defined]
        cuts.append(Cut(name, param, start, offset, numel))
    return cuts, group


def _check_stage3(zero: Any) -> None:
    """Refuse what moves partitions or replaces the optimizer.

    Raises:
        ValueError: names the option.
    """
    unserved = {
        "offload_optimizer.device = 'nvme'": getattr(zero, "swap_optimizer", False),
        "offload_optimizer.ratio": getattr(zero, "offload_optimizer", False)
        and getattr(zero, "partial_offload", 1) != 1,
        "zenflow": getattr(zero, "zenflow", False),
        "offload_param.device = 'nvme'": getattr(zero, "params_in_nvme_and_cpu", False),
        "zero_hpz_partition_size": getattr(zero, "zero_hpz_partition_size", 1) > 1,
    }
    for option, used in unserved.items():
        if used:
            raise ValueError(f"zero_optimization.{option} was not tested with this optimizer; remove it")


@contextmanager
def described(model: nn.Module) -> Iterator[None]:
    """Parameters made under zero.Init are empty; inside, they are known by the shape they have when gathered."""
    gathered = [param for param in model.parameters() if hasattr(param, "ds_shape")]
    for param in gathered:
        param._distopt_flat = FlatShard(tuple(param.ds_shape), 0, None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for param in gathered:
            del param._distopt_flat  # type: ignore[attr-defined]
