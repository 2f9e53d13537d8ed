"""Split parameters on every layout: against their parts as parameters of their own in one process, and in checkpoints."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distopt
from distopt import checkpoint
from tests.distributed.layouts import LAYOUTS, Full, Laid, Model, lay_out, ranks_mesh
from tests.distributed.pool import pool
from tests.distributed.test_checkpoint import Holder, assert_same
from tests.splits import BLOCKS, CASES, NAMES, STEPS, Case, alone, gradients, in_parts, weights

HERE = __name__
OPTIONS: dict[str, dict[str, Any]] = {
    "Muon": {"lr": 0.01},
    "NorMuon": {"lr": 0.01},
    "SOAP": {"lr": 0.01, "precondition_frequency": 2, "max_precond_dim": 24},
    "Adafactor": {"lr": 0.01},
    "Shampoo": {"lr": 0.01, "eps": 1e-2, "grafting": "adam", "precondition_frequency": 2, "block_size": 16},
}
ALL = {**CASES, **BLOCKS}
# Sums over ranks come in another order; whole matrices do not.
LIMIT = {"Adafactor": 1e-6}
ON = [
    (layout, size)
    for layout in ("replicated", "partitioned", "fsdp", "hsdp", "columns", "tp", "fsdp-tp", "flat", "flat-concatenated")
    for size in LAYOUTS[layout].world_sizes
]


def build(optimizer: str, layout: str, name: str, seed: int = 1) -> tuple[Laid, distopt.Optimizer]:
    case = ALL[name]
    laid = lay_out(LAYOUTS[layout], weights(case, seed))
    options = {**OPTIONS[optimizer], **LAYOUTS[layout].options(), "split": case.split or None}
    return laid, getattr(distopt, optimizer)(laid.named(), **options)


def train(laid: Laid, built: distopt.Optimizer, case: Case, steps: range) -> None:
    for step in steps:
        laid.set_grads(gradients(case, step))
        built.step()


def names_of(optimizer: str) -> list[str]:
    """What is tried: blocks of the rule that has them, splits of the others."""
    return list(BLOCKS if "block_size" in OPTIONS[optimizer] else CASES)


# ---- what ranks run


def on_ranks(optimizer: str, layout: str, expected: dict[str, Full]) -> dict[str, float]:
    """The largest difference of any element of each case, in one go: a call of a pool costs more than a case."""
    found = {}
    for name, full in expected.items():
        with alone():
            laid, built = build(optimizer, layout, name)
            train(laid, built, ALL[name], range(STEPS))
        gathered = laid.gather(dict.fromkeys(NAMES, ALL[name].shape))
        found[name] = max(float((gathered[key] - full[key]).abs().max()) for key in NAMES)
    return found


@cache
def expected_of(optimizer: str) -> dict[str, Full]:
    return {
        name: in_parts(ALL[name], optimizer, {**OPTIONS[optimizer], "block_size": None})
        if "block_size" in OPTIONS[optimizer]
        else in_parts(ALL[name], optimizer, OPTIONS[optimizer])
        for name in names_of(optimizer)
    }


@pytest.mark.parametrize(("layout", "world_size"), ON)
@pytest.mark.parametrize("optimizer", OPTIONS)
def test_a_split_parameter_is_trained_as_its_parts_in_one_process(optimizer: str, layout: str, world_size: int) -> None:
    for found in pool(world_size).run(f"{HERE}:on_ranks", optimizer, layout, expected_of(optimizer)):
        assert {name: value for name, value in found.items() if not value <= LIMIT.get(optimizer, 0)} == {}


# ---- the native checkpoint


def save(optimizer: str, layout: str, name: str, path: Path) -> None:
    laid, built = build(optimizer, layout, name)
    train(laid, built, ALL[name], range(STEPS))
    checkpoint.save(path, model=Holder(laid.params), optimizer=built)


def load_and_save(optimizer: str, layout: str, name: str, source: Path, target: Path) -> None:
    laid, built = build(optimizer, layout, name, seed=2)
    train(laid, built, ALL[name], range(7, 8))
    checkpoint.load(source, model=Holder(laid.params), optimizer=built)
    checkpoint.save(target, model=Holder(laid.params), optimizer=built)


def run(world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    """On warm ranks, or here without a process group; the first rank's answer."""
    if world_size == 1:
        return function(*args)
    return pool(world_size).run(f"{HERE}:{function.__name__}", *args)[0]


CHAIN = [("columns", 2), ("replicated", 1), ("flat", 4), ("partitioned", 2), ("fsdp-tp", 4), ("tp", 2)]
KEPT = ["rows", "interleaved", "output_heads", "interleaved_columns", "transposed_heads", "experts_transposed"]


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("optimizer", ["NorMuon", "SOAP", "Adafactor"])
def test_states_of_parts_are_unchanged_by_other_layouts(optimizer: str, name: str, tmp_path: Path) -> None:
    run(4, save, optimizer, "fsdp", name, tmp_path / "0")
    for number, (layout, world_size) in enumerate(CHAIN, 1):
        source, target = tmp_path / str(number - 1), tmp_path / str(number)
        run(world_size, load_and_save, optimizer, layout, name, source, target)
        assert_same(tmp_path / "0", target)


def resumed(optimizer: str, layout: str, name: str, path: Path) -> list[bool]:
    """Whether each parameter has the same bits after going on and after being loaded into new objects."""
    laid, built = build(optimizer, layout, name)
    train(laid, built, ALL[name], range(STEPS))
    checkpoint.save(path, model=Holder(laid.params), optimizer=built)
    again, resumed = build(optimizer, layout, name, seed=2)
    checkpoint.load(path, model=Holder(again.params), optimizer=resumed)
    for each, optimizer_ in ((laid, built), (again, resumed)):
        train(each, optimizer_, ALL[name], range(STEPS, 2 * STEPS))
    first, second = (each.gather(dict.fromkeys(NAMES, ALL[name].shape)) for each in (laid, again))
    return [torch.equal(first[key], second[key]) for key in NAMES]


@pytest.mark.parametrize("layout", ["fsdp", "columns", "flat"])
@pytest.mark.parametrize("optimizer", ["SOAP", "Adafactor"])
def test_training_of_parts_resumes_bit_for_bit(optimizer: str, layout: str, tmp_path: Path) -> None:
    for name in KEPT:
        assert pool(4).run(f"{HERE}:resumed", optimizer, layout, name, tmp_path / name) == [[True, True]] * 4


def refused(path: Path, split: str) -> str:
    laid, _ = build("NorMuon", "fsdp", "rows")
    built = distopt.NorMuon(laid.named(), split=split)
    try:
        checkpoint.load(path, model=Holder(laid.params), optimizer=built)
    except ValueError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_another_split_is_refused(tmp_path: Path) -> None:
    pool(2).run(f"{HERE}:save", "NorMuon", "fsdp", "rows", tmp_path / "saved")
    for message in pool(2).run(f"{HERE}:refused", tmp_path / "saved", "q:30,k:8,v:5"):
        assert "saved with split='q:31,k:7,v:5', here it has 'q:30,k:8,v:5'" in message


# ---- torch.distributed.checkpoint


def sharded(optimizer: str, name: str, seed: int) -> tuple[Model, distopt.Optimizer]:
    """Under FSDP2, or plain where there is no process group."""
    model = Model(weights(ALL[name], seed))
    if dist.is_initialized():
        fully_shard(model, mesh=ranks_mesh())
    return model, getattr(distopt, optimizer)(model.named_parameters(), **OPTIONS[optimizer], split=ALL[name].split)


def step_through(model: Model, built: distopt.Optimizer, name: str, steps: range) -> None:
    for step in steps:
        for key, param in model.weights().items():
            grad = gradients(ALL[name], step)[key]
            assert grad is not None
            param.grad = distribute_tensor(grad, ranks_mesh(), [Shard(0)]) if isinstance(param, DTensor) else grad
        built.step()


def states_of(built: distopt.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}/{key}": (value.full_tensor() if isinstance(value, DTensor) else value).clone().flatten()
        for index, entry in built.state_dict()["state"].items()
        for key, value in entry.items()
    }


def dcp_save(optimizer: str, name: str, path: str) -> dict[str, Tensor]:
    model, built = sharded(optimizer, name, 1)
    step_through(model, built, name, range(STEPS))
    dcp.save({"optimizer": get_optimizer_state_dict(model, built)}, checkpoint_id=path)
    return states_of(built)


def dcp_load(optimizer: str, name: str, path: str) -> dict[str, Tensor]:
    model, built = sharded(optimizer, name, 2)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    state = {"optimizer": get_optimizer_state_dict(model, built)}
    dcp.load(state, checkpoint_id=path)
    set_optimizer_state_dict(model, built, state["optimizer"])
    return states_of(built)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("optimizer", ["NorMuon", "SOAP", "Adafactor"])
def test_torch_distributed_checkpoint_of_parts_loads_on_other_numbers_of_ranks(
    optimizer: str, name: str, tmp_path: Path
) -> None:
    expected = run(4, dcp_save, optimizer, name, str(tmp_path / "dcp"))
    assert any(value.any() for key, value in expected.items() if not key.endswith("/step"))
    for world_size in (4, 2, 1):
        found = run(world_size, dcp_load, optimizer, name, str(tmp_path / "dcp"))
        assert set(found) == set(expected)
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def full_round_trip(optimizer: str, name: str) -> list[str]:
    """States that a full state dict, which only rank 0 has, does not bring back."""
    model, built = sharded(optimizer, name, 1)
    step_through(model, built, name, range(STEPS))
    saved = get_optimizer_state_dict(model, built, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    again, loaded = sharded(optimizer, name, 2)
    step_through(again, loaded, name, range(7, 8))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(again, loaded, saved, options=options)
    first, second = states_of(built), states_of(loaded)
    return [key for key in first if not torch.equal(first[key], second[key])]


@pytest.mark.parametrize("optimizer", ["NorMuon", "SOAP", "Adafactor"])
def test_full_state_dict_of_parts_keeps_every_bit(optimizer: str) -> None:
    for name in KEPT:
        assert pool(4).run(f"{HERE}:full_round_trip", optimizer, name) == [[]] * 4
