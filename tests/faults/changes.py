"""What the ranks of `test_changes.py` run."""

import math
import warnings
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import distopt


def bad_lr_on_rank_one() -> tuple[str, bool]:
    """The error of this rank, and whether the weights are unchanged."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = distopt.AdamW([weight])
    weight.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    optimizer.step()
    before = weight.to_local().clone()
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["lr"] = math.nan
    try:
        optimizer.step()
    except ValueError as error:
        return str(error), torch.equal(weight.to_local(), before)
    return "", False


def partitioned_channels_last() -> float:
    """How far a channels_last weight moves in one step."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = distopt.AdamW(conv.parameters(), lr=0.1, process_group=dist.group.WORLD)
    conv.weight.grad = torch.ones(4, 4, 3, 3)
    before = conv.weight.detach().clone()
    optimizer.step()
    return float((conv.weight - before).abs().min())


def save_after_evaluation(path: str) -> bool:
    """Whether a checkpoint taken after a forward without backward loads again with equal parameters."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    fully_shard(model, mesh=mesh)
    optimizer = distopt.create_optimizer("muon", model, lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(torch.ones(2, 6))
    distopt.checkpoint.save(path, model=model, optimizer=optimizer)
    saved = [param.to_local().clone() for param in model.parameters()]  # type: ignore[attr-defined]
    optimizer.zero_grad()
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    distopt.checkpoint.load(path, model=model, optimizer=optimizer)
    return all(torch.equal(a, b.to_local()) for a, b in zip(saved, model.parameters(), strict=True))  # type: ignore[attr-defined]


def lone_state_dict() -> str:
    """The error of rank 0, which alone calls a collective state_dict()."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = distopt.SOAP([("weight", weight)])
    weight.grad = distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)])
    optimizer.step()
    if dist.get_rank() == 1:
        return ""
    try:
        with mock.patch("distopt.bound.DEADLINE", timedelta(seconds=0.5)):
            optimizer.state_dict()
    except RuntimeError as error:
        return str(error)
    return "no error"


def warnings_of_bare_tensors() -> tuple[list[str], list[str]]:
    """What is said about parameters without names, and about some with names."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    found = []
    for params in ([weight], [("weight", weight)]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            distopt.AdamW(params).plan  # noqa: B018
        found.append([str(warning.message) for warning in caught])
    return found[0], found[1]
