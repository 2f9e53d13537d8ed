"""FSDP1 with `use_orig_params=True`: outside of forward and backward a parameter is the 1-D part of it that lies here."""

from __future__ import annotations

from torch import nn

from distopt.layouts.flat import FlatShard


def declare_fsdp1(model: nn.Module) -> None:
    """Tell the parameters of FullyShardedDataParallel modules which range of which tensor they hold.

    Raises:
        ValueError: `use_orig_params=False`, which leaves one vector of many parameters.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    for module in model.modules():
        if not isinstance(module, FullyShardedDataParallel) or module._handle is None:
            continue
        flat = module._handle.flat_param
        if flat._params is None:
            raise ValueError(
                "FullyShardedDataParallel(use_orig_params=False) makes one vector of all parameters, so that no rule can "
                "be chosen for each; pass use_orig_params=True"
            )
        whole = not module._handle.uses_sharded_strategy  # NO_SHARD, also where there is one rank
        for param, shape, part in zip(flat._params, flat._shapes, flat._shard_param_infos):
            start, group = part.intra_param_start_idx or 0, module._handle.process_group
            param._distopt_flat = None if whole else FlatShard(tuple(shape), start, group)  # type: ignore[attr-defined]
