"""What the ranks of `test_fsdp1.py` run."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import distopt

STEPS = 6
Weights = dict[str, Tensor]
wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))


def build() -> nn.Sequential:
    """Matrices that the ranks' equal ranges cut in the middle of a row; a vector that lies on one rank only."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(24, 37), nn.Tanh(), nn.Linear(37, 24), nn.LayerNorm(24))
    return nn.Sequential(nn.Linear(12, 24), block, nn.Linear(24, 5, bias=False))


def inputs(step: int) -> Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: Any, steps: range = range(STEPS)) -> None:
    for step in steps:
        model(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def one_process(name: str, options: dict[str, Any]) -> Weights:
    model = build()
    train(model, distopt.create_optimizer(name, model, **options))
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def error(name: str, options: dict[str, Any], expected: Weights, resumed: bool, strategy: str = "FULL_SHARD") -> float:
    """The largest difference to the weights of one process, every rank being fed the same batch."""
    models = [
        wrap(build(), auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}), sharding_strategy=ShardingStrategy[strategy])
        for _ in range(2)
    ]
    model = models[0]
    optimizer = distopt.create_optimizer(name, model, **options)
    if resumed:
        train(model, optimizer, range(3))
        saved, weights = optimizer.state_dict(), model.state_dict()
        model = models[1]
        model.load_state_dict(weights)
        optimizer = distopt.create_optimizer(name, model, **{**options, "lr": 1.0})
        optimizer.load_state_dict(saved)
        train(model, optimizer, range(3, STEPS))
    else:
        train(model, optimizer)
    assert any(p.numel() < expected[n].numel() for n, p in _flat(model)) == (strategy != "NO_SHARD")
    with FullyShardedDataParallel.summon_full_params(model):
        found = {key: value.detach().clone() for key, value in _flat(model)}
    return max((found[key] - expected[key]).abs().max().item() for key in expected)


def _flat(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name.replace("_fsdp_wrapped_module.", ""), param) for name, param in model.named_parameters()]


def complaint(how: str) -> str:
    """What is said about an optimizer that cannot find matrices."""
    try:
        if how == "without use_orig_params":
            distopt.create_optimizer("muon", FullyShardedDataParallel(build(), device_id=torch.device("cpu")), lr=0.1)
        elif how == "of parameters":
            distopt.Adafactor(wrap(build()).parameters(), lr=0.1)
        else:
            model = build()
            optimizer = distopt.create_optimizer("adafactor", model, lr=0.1)
            train(wrap(model), optimizer, range(1))
    except ValueError as refused:
        return str(refused)
    finally:
        dist.barrier()
    return "nothing"
