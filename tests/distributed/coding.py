"""What the ranks of `test_codecs.py` run, and the single process that they are compared with."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import distopt
from distopt.state.units import MASTER
from tests.distributed.layouts import LAYOUTS, Full, lay_out, local_tensor
from tests.distributed.training import STEPS, gradients, weights

# Rows of a tile and a bit, of less than one, of several; what is below the threshold; more than a chunk; a convolution.
CODED = {
    "long_rows": (9, 300),
    "short_rows": (50, 48),
    "even": (12, 256),
    "vector": (3001,),
    "large": (130, 520),
    "small": (30, 30),
    "experts": (3, 20, 130),
    "empty": (0, 8),
}
BLOCKS = {"q": (144, 192), "out": (192, 144), "up": (200, 96), "down": (96, 200), "router": (12, 96), "norm": (1500,)}
MATRICES = {"wide": (18, 130), "tall": (200, 24), "square": (40, 40), "large": (72, 300), "small": (6, 5)}


def train(built: distopt.Optimizer, shapes: dict[str, Any], set_grads: Any, steps: range) -> None:
    """Some steps with gradients whose scales differ by orders of magnitude within a row."""
    for step in steps:
        spread = torch.Generator().manual_seed(5)
        set_grads(
            {
                name: None if grad is None else grad * torch.exp(2 * torch.randn(grad.shape, generator=spread))
                for name, grad in gradients(shapes, step).items()
            }
        )
        built.step()


def one_process(
    optimizer: str, options: dict[str, Any], shapes: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Full, dict[str, dict[str, Tensor]]]:
    """Weights and decoded states after all steps without any process group."""
    params = {name: nn.Parameter(weight.to(dtype)) for name, weight in weights(shapes).items()}
    built = getattr(distopt, optimizer)(params.items(), **options)

    def set_grads(grads: dict[str, Tensor | None]) -> None:
        for name, grad in grads.items():
            params[name].grad = None if grad is None else grad.to(dtype)

    train(built, shapes, set_grads, range(STEPS))
    states = built.state_dict()["state"]
    found = {name: {k: v for k, v in states[i].items() if k != "step"} for i, name in enumerate(params)}
    return {name: param.detach() for name, param in params.items()}, found


def on_ranks(
    optimizer: str,
    options: dict[str, Any],
    layout: str,
    shapes: dict[str, Any],
    expected: Full,
    states: dict[str, dict[str, Tensor]],
    dtype: torch.dtype = torch.float32,
) -> tuple[list[str], int]:
    """What of the weights and of the states that lie as they do differs on this rank from one process; and by how many
    bytes traffic, or state, differs from the plan."""
    laid = lay_out(LAYOUTS[layout], {name: weight.to(dtype) for name, weight in weights(shapes).items()})
    built = getattr(distopt, optimizer)(laid.named(), **options, **LAYOUTS[layout].options())

    def set_grads(grads: dict[str, Tensor | None]) -> None:
        laid.set_grads({name: None if grad is None else grad.to(dtype) for name, grad in grads.items()})

    built.plan  # noqa: B018 - binds
    built.reset_traffic()
    train(built, shapes, set_grads, range(3))  # after which a gradient is missing, and there are two cohorts
    traffic = built.traffic()["bytes_sent"] - 3 * built.plan.summary()["bytes_sent_per_step"]
    train(built, shapes, set_grads, range(3, STEPS))
    wrong = [
        name
        for name, param in laid.params.items()
        if not torch.equal(local_tensor(param).detach(), laid.local(name, expected[name]))
    ]
    bound = built._bind()
    for group in bound.groups:
        for number, window in enumerate(group.windows):
            name = window.spec.name
            kept = (*group.units.of[number].stores, MASTER) if number in group.units.of else ()
            for key in (key for key in kept if key in states[name]):
                mine = group.units.read(number, None, key)
                whole = laid.local(name, states[name][key]).flatten()[window.start : window.stop]
                wrong += [f"{name}/{key}"] * (not torch.equal(mine, whole))
        for (number, _, key), store in group.units.owned.items():
            name = group.windows[number].spec.name
            wrong += [f"{name}/{key}"] * (not torch.equal(store.matrix(), states[name][key]))
    dist.barrier()
    return wrong, traffic


def masters(master_codec: str, sharded: bool) -> dict[str, Tensor]:
    """A model's state dict with its master weights, whole, after some steps in bfloat16, between which all states are loaded
    again: of this process, or under FSDP2, where they have to lie as the parameters do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 70), nn.BatchNorm1d(70), nn.Linear(70, 33), nn.Linear(33, 1)).bfloat16()
    if sharded:
        fully_shard(model)
    built = distopt.create_optimizer("adamw", model, lr=1e-4, master_codec=master_codec, state_codec="int8")
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).bfloat16()
            cut = isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if cut else grad
        built.step()
        built.load_state_dict(built.state_dict())
    found = built.master_state_dict(model)
    assert list(found) == list(model.state_dict())
    for name, param in model.named_parameters():
        assert found[name].dtype is torch.float32
        assert isinstance(found[name], DTensor) == sharded
        assert not sharded or found[name].placements == param.placements
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


def masters_differ(master_codec: str, expected: dict[str, Tensor]) -> list[str]:
    """The names of what a sharded model's master state dict has otherwise."""
    found = masters(master_codec, sharded=True)
    assert found.keys() == expected.keys()
    return [name for name, value in found.items() if not torch.equal(value, expected[name])]
