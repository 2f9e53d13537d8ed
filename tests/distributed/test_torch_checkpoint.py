"""torch.distributed.checkpoint and torch's state dicts of sharded optimizers, on a real model under fully_shard.

Full and flattened at once is not among the forms: torch 2.13 cannot load it back, whatever the optimizer.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distopt
from tests.distributed.layouts import Model, local_tensor, mesh, ranks_mesh
from tests.distributed.pool import pool
from tests.distributed.test_checkpoint import (
    FROM_ZERO,
    KINDS,
    OPTIONS,
    STEPS,
    anywhere,
    gradients,
    one_process,
    weights,
)

HERE = __name__


def sharded(optimizer: str, seed: int = 1) -> tuple[Model, distopt.Optimizer]:
    """A model under FSDP2, or a plain one where there is no process group."""
    model = Model(weights(optimizer, seed))
    if dist.is_initialized():
        fully_shard(model, mesh=ranks_mesh())
    return model, getattr(distopt, optimizer)(model.named_parameters(), **OPTIONS[optimizer])


def step_through(optimizer: str, model: Model, built: distopt.Optimizer, steps: range) -> None:
    for step in steps:
        for name, param in model.weights().items():
            grad = gradients(optimizer, step)[name]
            assert grad is not None
            param.grad = distribute_tensor(grad, ranks_mesh(), [Shard(0)]) if isinstance(param, DTensor) else grad
        built.step()


def values_of(model: Model, built: distopt.Optimizer) -> dict[str, Tensor]:
    """All parameters and states, whole and flat, by the names of a native checkpoint; collective."""
    named = model.weights()
    found: dict[str, Tensor] = {f"model/{name}": param.detach() for name, param in named.items()}
    saved = built.state_dict()
    for index, name in enumerate(named):
        for key, value in saved["state"][index].items():
            found[f"state/{name}/{key}"] = value
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone().flatten()
        for name, value in found.items()
    }


def differing(mine: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert set(mine) == set(other)
    return [name for name in mine if not torch.equal(mine[name], other[name])]


def torch_round_trip(optimizer: str, form: str) -> tuple[list[str], list[str], bool]:
    """get and set with these options: what differs at once, and after two more steps; whether steps were counted."""
    options = {
        "sharded": StateDictOptions(),
        "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
        "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    }[form]
    model, built = sharded(optimizer)
    step_through(optimizer, model, built, range(STEPS))
    saved_model = get_model_state_dict(model, options=options)
    saved = get_optimizer_state_dict(model, built, options=options)
    again, resumed = sharded(optimizer, seed=2)
    step_through(optimizer, again, resumed, range(7, 8))
    if form == "full":  # offloaded to the CPU, only rank 0 has it
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, saved_model, options=options)
    set_optimizer_state_dict(again, resumed, saved, options=options)
    at_once = differing(values_of(model, built), values_of(again, resumed))
    step_through(optimizer, model, built, range(STEPS, STEPS + 2))
    step_through(optimizer, again, resumed, range(STEPS, STEPS + 2))
    later = values_of(again, resumed)
    return (
        at_once,
        differing(values_of(model, built), later),
        all(float(value) == STEPS + 2 for name, value in later.items() if name.endswith("/step")),
    )


@pytest.mark.parametrize("form", ["sharded", "full", "flattened"])
@pytest.mark.parametrize("optimizer", KINDS)
def test_torch_state_dict_round_trip_keeps_every_bit(optimizer: str, form: str) -> None:
    for at_once, later, counted in pool(4).run(f"{HERE}:torch_round_trip", optimizer, form):
        assert at_once == []
        assert later == []
        assert counted


def full_state_dict(optimizer: str) -> dict[str, Tensor]:
    """What get_optimizer_state_dict hands to rank 0 in full."""
    model, built = sharded(optimizer)
    step_through(optimizer, model, built, range(STEPS))
    saved = get_optimizer_state_dict(model, built, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {
        f"state/{name.split('.')[1]}/{key}": value
        for name, entry in saved.get("state", {}).items()
        for key, value in entry.items()
        if key != "step"
    }


@pytest.mark.parametrize("optimizer", ["AdamW", "SOAP"])
def test_full_state_dict_holds_the_states_of_one_process(optimizer: str) -> None:
    found = pool(4).run(f"{HERE}:full_state_dict", optimizer)[0]
    expected = {name: value for name, value in one_process(optimizer).items() if name.startswith("state/")}
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    assert differing(found, expected) == []


def dcp_save(optimizer: str, path: str) -> dict[str, Tensor]:
    model, built = sharded(optimizer)
    step_through(optimizer, model, built, range(STEPS))
    dcp.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, built)}, checkpoint_id=path
    )
    return values_of(model, built)


def dcp_load(optimizer: str, path: str) -> dict[str, Tensor]:
    """Into a fresh optimizer, which has gradients but never stepped."""
    model, built = sharded(optimizer, seed=2)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, built)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, built, state["optimizer"])
    return values_of(model, built)


@pytest.mark.parametrize("optimizer", KINDS)
def test_torch_distributed_checkpoint_loads_on_other_numbers_of_ranks(optimizer: str, tmp_path: Path) -> None:
    expected = pool(4).run(f"{HERE}:dcp_save", optimizer, str(tmp_path / "dcp"))[0]
    for world_size in (4, 2, 1):
        found = anywhere(world_size, dcp_load, optimizer, str(tmp_path / "dcp"))
        assert differing(found, expected) == [], f"{world_size} ranks"


def get_without_a_step(optimizer: str, with_gradients: bool) -> list[str]:
    """Parameters that get_optimizer_state_dict changed, and states that it left out or made."""
    model, built = sharded(optimizer)
    before = {name: param.detach().full_tensor() for name, param in model.weights().items()}
    for param in model.parameters():
        param.grad = torch.ones_like(param) if with_gradients else None
    saved = get_optimizer_state_dict(model, built)
    wrong = [name for name, p in model.weights().items() if not torch.equal(before[name], p.detach().full_tensor())]
    for name in before:
        entry = saved["state"].get(f"layers.{name}.weight", {})
        wrong += [f"{name} has no state"] if not entry else []
        wrong += [f"{name}/{key}" for key, value in entry.items() if bool((local_tensor(value) != 0).any())]
    return wrong


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("optimizer", FROM_ZERO)
def test_torch_state_dict_of_a_fresh_optimizer_is_complete_and_never_steps(
    optimizer: str, with_gradients: bool
) -> None:
    assert pool(2).run(f"{HERE}:get_without_a_step", optimizer, with_gradients) == [[]] * 2


def frozen_on_torch_path(optimizer: str) -> tuple[list[str], list[str]]:
    """Train, freeze two parameters, get and set: which of them get leaves out, and what set changes."""
    model, built = sharded(optimizer)
    step_through(optimizer, model, built, range(STEPS))
    for name in ("up", "column"):
        model.weights()[name].requires_grad_(False)
    before = values_of(model, built)
    saved = get_optimizer_state_dict(model, built)
    left_out = [name for name in ("up", "column") if not saved["state"].get(f"layers.{name}.weight")]
    set_optimizer_state_dict(model, built, saved)
    return left_out, differing(before, values_of(model, built))


@pytest.mark.parametrize("optimizer", KINDS)
def test_states_of_frozen_parameters_are_kept_on_the_path_of_torch(optimizer: str) -> None:
    assert pool(4).run(f"{HERE}:frozen_on_torch_path", optimizer) == [([], [])] * 4


def loaded_with_other_placements(kind: str) -> tuple[str, list[str]]:
    """Load a state dict whose DTensors lie elsewhere: what is said, and what was changed."""
    model, built = sharded("AdamW")
    step_through("AdamW", model, built, range(STEPS))
    before = values_of(model, built)
    saved = built.state_dict()
    index = list(model.weights()).index("up")
    value = saved["state"][index]["exp_avg"]
    other = {
        "placements": lambda: distribute_tensor(value.full_tensor(), value.device_mesh, [Shard(1)]),
        "mesh": lambda: distribute_tensor(
            value.full_tensor(), mesh(("replicate", 2), ("shard", 2))["shard"], [Shard(0)]
        ),
        "shape": lambda: distribute_tensor(value.full_tensor()[:-1], value.device_mesh, [Shard(0)]),
    }[kind]()
    state = {
        i: {key: other if (i, key) == (index, "exp_avg") else v + 1.0 for key, v in entry.items()}
        for i, entry in saved["state"].items()
    }
    message = ""
    try:
        built.load_state_dict({**saved, "state": state})
    except ValueError as error:
        message = str(error)
    return message, differing(before, values_of(model, built))


@pytest.mark.parametrize("kind", ["placements", "mesh", "shape"])
def test_a_loaded_dtensor_that_lies_elsewhere_is_refused_and_nothing_changes(kind: str) -> None:
    for message, changed in pool(4).run(f"{HERE}:loaded_with_other_placements", kind):
        assert "layers.up.weight" in message
        assert "exp_avg" in message
        assert changed == []


def alone_on_a_mesh() -> list[bool]:
    """A DTensor on a mesh of this rank alone: what lives with the matrix's owner is all here."""
    alone = mesh(("other", 2), ("shard", 1))["shard"]
    found = []
    for placement in (Shard(0), Replicate()):
        generator = torch.Generator().manual_seed(0)
        full = torch.randn((6, 10), generator=generator)
        plain, param = nn.Parameter(full.clone()), nn.Parameter(distribute_tensor(full, alone, [placement]))
        ours, theirs = (distopt.SOAP([("w", p)], lr=0.01) for p in (param, plain))
        for p, built in ((param, ours), (plain, theirs)):
            grad = torch.ones(6, 10) + full
            p.grad = distribute_tensor(grad, alone, [placement]) if p is param else grad
            built.step()
        saved, expected = (built.state_dict()["state"][0] for built in (ours, theirs))
        found += [
            torch.equal(saved[name].full_tensor(), expected[name]) for name in ("gram_left", "gram_right", "exp_avg")
        ]
    return found


def test_a_matrix_that_one_rank_has_all_of_is_saved_with_its_owner_s_states() -> None:
    assert pool(2).run(f"{HERE}:alone_on_a_mesh") == [[True] * 6] * 2
