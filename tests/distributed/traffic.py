"""What the ranks of `test_traffic.py` run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distopt
from tests.cases import collect
from tests.distributed.layouts import LAYOUTS, lay_out
from tests.distributed.training import gradients, weights

Bytes = dict[str, int]


@contextmanager
def counting() -> Iterator[Bytes]:
    """Counts what goes through torch.distributed itself, whoever calls it: what leaves and what enters this rank. An
    all-reduce counts its buffer once each way."""
    moved = {"sent": 0, "received": 0}

    def wrapped(name: str, count: Callable[..., tuple[int, int]]) -> Any:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            sent, received = count(*args, **kwargs)
            moved["sent"] += sent
            moved["received"] += received
            return real(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    def all_to_all(out: Any, into: Any, out_sizes: Any, in_sizes: Any, group: Any, **_: Any) -> tuple[int, int]:
        me = dist.get_rank(group)
        width = into.element_size()
        sent = sum(n for peer, n in enumerate(in_sizes) if peer != me)
        return sent * width, sum(n for peer, n in enumerate(out_sizes) if peer != me) * width

    def broadcast(buffer: Any, group: Any, group_src: int, **_: Any) -> tuple[int, int]:
        if group_src == dist.get_rank(group):
            return buffer.nbytes * (dist.get_world_size(group) - 1), 0
        return 0, buffer.nbytes

    with (
        wrapped("all_to_all_single", all_to_all),
        wrapped("all_reduce", lambda buffer, *_, **__: (buffer.nbytes, buffer.nbytes)),
        wrapped("broadcast", broadcast),
    ):
        yield moved


def one_step(optimizer: str, layout: str, options: dict[str, Any] | None = None) -> tuple[Bytes, Bytes, Bytes]:
    """(counted, reported by the optimizer, planned) bytes of the third step."""
    shapes = collect()[optimizer.lower()].accepted(LAYOUTS[layout].shapes)
    laid = lay_out(LAYOUTS[layout], weights(shapes))
    built = getattr(distopt, optimizer)(laid.named(), **(options or {}), **LAYOUTS[layout].options())
    for step in range(2):
        laid.set_grads(gradients(shapes, step))
        built.step()
    laid.set_grads(gradients(shapes, 2))
    built.reset_traffic()
    with counting() as counted:
        built.step()
    traffic, plan = built.traffic(), built.plan.summary()
    return (
        dict(counted),
        {"sent": traffic["bytes_sent"], "received": traffic["bytes_received"]},
        {"sent": plan["bytes_sent_per_step"], "received": plan["bytes_received_per_step"]},
    )


def exchanged() -> Bytes:
    """Bytes of one Muon step on even FSDP2 shards of eight layers, without verdict."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = {}
    for layer in range(8):
        for name, shape in {"qkv": (96, 32), "out": (32, 32), "up": (128, 32), "down": (32, 128)}.items():
            weight = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)]))
            weight.grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
            params[f"{layer}.{name}"] = weight
    built = distopt.Muon(params.items(), nonfinite=None)
    votes = 8 * len(params) + 4
    built.plan  # noqa: B018  (bind before counting)
    with counting() as counted:
        built.step()
    elements = sum(param.numel() for param in params.values())
    return {
        "sent": (counted["sent"] - votes) // 4,
        "received": (counted["received"] - votes) // 4,
        "elements": elements,
    }
