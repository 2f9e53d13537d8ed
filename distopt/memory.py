"""What an optimizer's states take, by formula: nothing is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.build import model_of_shapes, parameter_groups
from distopt.layouts import Layout, Sharded, layout_of, reshard
from distopt.options import check_options, complete_group, optimizer_defaults
from distopt.plan.buckets import Spec
from distopt.plan.build import plan_group
from distopt.plan.geometry import logical_of
from distopt.plan.pages import device_bytes, plan_pages
from distopt.plan.paper import Mesh, tensor_parallel_dim
from distopt.quasi_newton import DRIVERS, driver_class
from distopt.rule import Rule, require
from distopt.rules import RULES, nearest
from distopt.state.grouping import planned_group


def state_bytes(
    name: str,
    model_or_shapes: nn.Module | Mapping[str, tuple[int, ...]],
    *,
    state_codec: str | dict[str, str] = "fp32",
    layout: str | Mesh | None = None,
    partition: bool = False,
    on_rank: int | None = None,
    offload: str | dict[str, float] | None = None,
    device_budget: int | str | None = None,
    **options: Any,
) -> int:
    """Bytes of state that `create_optimizer(name, model, …)` keeps on the device of one rank.

    These are the bytes of every state's own elements and scales. Beside them there are one counter per group, and less
    than 64 bytes per group and state where small tensors are packed together.

    Args:
        name: of a rule, or of a quasi-Newton method, which has no codecs, no pages and no partitions.
        model_or_shapes: a model, which may be sharded, or on the meta device; or name → shape, where what is called
            embed…, wte or wpe is an embedding.
        state_codec: as of optimizers.
        layout: a mesh that need not exist, as "replicate=2,dp=64,tp=8" (FSDP2 along dp, Llama's projections along tp).
            None: as the parameters lie, shapes whole on one rank.
        partition: replicas (all ranks) partition states over themselves, as with `process_group=`.
        on_rank: which one; None: this process, or 0 of a mesh on paper.
        offload, device_budget: as of optimizers; slots that pages pass through count, what lies elsewhere does not.
        options: further ones of `create_optimizer` and of the rule: `rest`, `amsgrad`, `rank`, …

    Raises:
        TypeError: an option that there is not.
        ValueError: a name that is no optimizer's, an option or a layout that cannot be served.
    """
    known = [*RULES, *DRIVERS]
    require(
        name in known,
        f"no optimizer is called {name!r}{nearest(name, known)} (known: {', '.join(known)})",
    )
    model = model_or_shapes if isinstance(model_or_shapes, nn.Module) else model_of_shapes(dict(model_or_shapes))
    mesh = Mesh.parse(layout) if isinstance(layout, str) else layout
    here = dist.get_rank() if dist.is_initialized() else 0
    rank = on_rank if on_rank is not None else here if mesh is None else 0
    size = (dist.get_world_size() if dist.is_initialized() else 1) if mesh is None else mesh.size
    require(0 <= rank < size, f"on_rank={rank}: there are {size} ranks")
    require(
        mesh is not None or rank == here,
        f"on_rank={rank}: parameters are read as they lie on this rank, {here}; ask there, or give layout=",
    )
    replicas = tuple(range(size)) if partition else None
    reshard(model)
    if name in DRIVERS:
        asked = {"state_codec": state_codec, "offload": offload, "device_budget": device_budget, "partition": partition}
        options |= {key: value for key, value in asked.items() if value not in ("fp32", None, False)}
        lying = [
            (_on_paper(mesh, rank, key, param) if mesh is not None else layout_of(param, rank))
            for key, param in model.named_parameters()
            if param.requires_grad
        ]
        return _vectors_and_matrices(name, lying, rank, options)
    groups, own, _ = parameter_groups(name, model, lr=1e-3, **options)
    check_options(name, own)
    defaults = optimizer_defaults(name, {**own, "state_codec": state_codec, "offload": offload})
    plans = []
    for group in groups:
        settled = complete_group(group, defaults)
        specs = []
        for key, param in group["params"]:
            found = _on_paper(mesh, rank, key, param) if mesh is not None else layout_of(param, rank)
            specs.append(Spec(key, found, found.ranks.index(rank), param.dtype))
        plan = plan_group(planned_group(settled, specs, replicas, gpu=param.is_cuda), rank)
        plans.append(plan)
    plan_pages(plans, device_budget)
    return device_bytes(plans) + sum(_statistics_of_nothing(plan.rule, spec) for plan in plans for spec in plan.specs)


def _vectors_and_matrices(name: str, layouts: list[Layout], rank: int, options: dict[str, Any]) -> int:
    """Bytes of a quasi-Newton method: vectors lie as the parameters do, what is not a vector is whole on every rank."""
    whole = sum(prod(layout.shape) for layout in layouts)
    here = sum(rect.numel for layout in layouts for rect in layout.rects(layout.ranks.index(rank), 0))
    param = torch.empty(whole, device="meta", requires_grad=True)
    states = list(driver_class(DRIVERS[name])([param], **options).state[param].values())
    vectors = sum(state.nbytes for state in states if state.is_meta)
    return vectors // max(whole, 1) * here + sum(state.nbytes for state in states if not state.is_meta)


def _statistics_of_nothing(rule: Rule, spec: Spec) -> int:
    """Bytes of the row and column statistics that a rank with an empty shard keeps all the same: torch's checkpoint lets
    any replica of a statistic speak for all of them."""
    layout = spec.layout
    if not isinstance(layout, Sharded) or 0 in layout.shape or 0 not in (local := layout.local_shape(spec.index)):
        return 0
    logical = logical_of(layout.shape, rule)
    kinds = [state.kind for state in rule.states(logical.shape).values() if state.kind in ("row", "col", "matrix")]
    sizes = [
        prod(n if whole == face else 1 for n, whole, face in zip(local, layout.shape, logical.face(kind)))
        for kind in kinds
    ]
    return 4 * sum(sizes)


def _on_paper(mesh: Mesh, rank: int, name: str, param: Tensor) -> Layout:
    """The layout of a parameter among the ranks of the copy that `rank` belongs to."""
    shape = tuple(param.shape)
    first = mesh.layout(shape, tensor_parallel_dim(name, shape))
    spanned = np.asarray(mesh.coordinates[:, list(first.ranks)].any(1))
    alike = (mesh.coordinates == mesh.coordinates[:, [rank]]) | spanned[:, None]
    return replace(first, ranks=tuple(np.flatnonzero(alike.all(0)).tolist()))
