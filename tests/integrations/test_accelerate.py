"""Accelerate: `accelerator.prepare(model, optimizer)` and nothing else, on any number of ranks."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import distopt
from tests.distributed.pool import RankError, pool

pytest.importorskip("accelerate", minversion="1.13")
pytest.importorskip("transformers")

from accelerate import Accelerator

from tests.integrations.training import Full, accelerate, build, full_weights, model, on_cpu, plugin

KINDS = ["ddp", "fsdp2"]
RUN = "tests.integrations.training:accelerate"
ROUNDINGS = 4 * 2.0**-23  # of a weight near 1


@pytest.fixture(autouse=True)
def _no_environment_stays() -> Any:
    before = dict(os.environ)
    yield
    for key in os.environ.keys() - before.keys():
        del os.environ[key]


@cache
def one_process(name: str, same: bool = False) -> Full:
    return accelerate("one", name, same=same)


@cache
def on_ranks(name: str, ranks: int, kind: str) -> Full:
    return pool(ranks).run(RUN, kind, name)[0]


def furthest(one: Full, other: Full) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def moved(trained: Full) -> bool:
    return all((trained[name] - param).abs().max() > 1e-3 for name, param in full_weights(model()).items())


def equal(one: Full, other: Full) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("name", "limit"), [("AdamW", 1e-5), ("Adafactor", 1e-5), ("adamw", 1e-5), ("muon", 1e-4)])
def test_ranks_train_as_one_process(name: str, limit: float, ranks: int, kind: str) -> None:
    """With clipping, ten steps on the same global batches, by a class over bare parameters and by create_optimizer."""
    alone = one_process(name)
    assert moved(alone)
    distance = furthest(alone, on_ranks(name, ranks, kind))
    assert distance <= limit
    if limit == 1e-5:
        torchs = furthest(one_process("torch"), on_ranks("torch", ranks, kind))
        assert torchs > 0
        assert distance <= torchs + ROUNDINGS


@pytest.mark.parametrize("kind", KINDS)
def test_soap_makes_the_same_update_where_gradients_are_the_same(kind: str) -> None:
    alone = one_process("soap", same=True)
    assert moved(alone)
    for rank in pool(2).run(RUN, kind, "soap", same=True):
        assert equal(alone, rank)


@pytest.mark.parametrize("name", ["AdamW", "muon"])
@pytest.mark.parametrize("kind", ["one", *KINDS])
def test_accumulated_gradients_make_the_same_step(kind: str, name: str) -> None:
    if kind == "one":
        parts = accelerate(kind, name, accumulate=3)
    else:
        parts = pool(2).run(RUN, kind, name, accumulate=3)[0]
    assert furthest(one_process(name), parts) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_is_as_with_torchs_optimizer(kind: str) -> None:
    ours = pool(2).run(RUN, kind, "AdamW", precision="bf16")[0]
    theirs = pool(2).run(RUN, kind, "torch", precision="bf16")[0]
    assert all(weight.dtype == torch.float32 for weight in ours.values())
    assert furthest(ours, theirs) < 2e-2 < furthest(ours, full_weights(model()))
    assert furthest(ours, on_ranks("AdamW", 2, kind)) > 1e-5, "it was bf16"


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "muon", "soap"])
@pytest.mark.parametrize(
    ("kind", "state_dict_type"),
    [("one", ""), ("ddp", ""), ("fsdp2", "SHARDED_STATE_DICT"), ("fsdp2", "FULL_STATE_DICT")],
)
def test_a_loaded_state_continues_bit_for_bit(name: str, kind: str, state_dict_type: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 6, "directory": str(tmp_path), "save_at": 3}
    if state_dict_type:
        options["state_dict_type"] = state_dict_type
    if kind == "one":
        through, loaded = accelerate(kind, name, **options), accelerate(kind, name, resume=True, **options)
    else:
        through = pool(2).run(RUN, kind, name, **options)[0]
        loaded = pool(2).run(RUN, kind, name, resume=True, **options)[0]
    assert equal(through, loaded)


# ---- before parameters are final


def allocated_by_prepare(name: str) -> bool:
    """Run by ranks: whether anything was bound before the first step."""
    with on_cpu("fsdp2"):
        accelerator = Accelerator(fsdp_plugin=plugin("SHARDED_STATE_DICT"))
        net = model()
        optimizer = build(name, net)
        accelerator.prepare(net, optimizer)
        return optimizer._bound is not None


@pytest.mark.parametrize("name", ["AdamW", "muon"])
def test_prepare_allocates_no_states_of_the_whole_model(name: str) -> None:
    """It saves and loads every optimizer before it shards the model."""
    assert pool(2).run("tests.integrations.test_accelerate:allocated_by_prepare", name) == [False, False]


def built_before_sharding(by_name: bool) -> bool:
    """Run by ranks, without Accelerate: whether the model trains that was sharded after its optimizer was made."""
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    optimizer = distopt.create_optimizer("adamw", net, lr=0.1) if by_name else distopt.AdamW(net.parameters(), lr=0.1)
    fully_shard(net)
    before = [param.full_tensor().clone() for param in net.parameters()]
    net(torch.ones(2, 8)).square().mean().backward()
    optimizer.step()
    return all(not torch.equal(param.full_tensor(), old) for param, old in zip(net.parameters(), before))


def test_an_optimizer_built_before_sharding_finds_its_parameters_or_says_so() -> None:
    assert pool(2).run("tests.integrations.test_accelerate:built_before_sharding", True) == [True, True]
    with pytest.raises(RankError, match=r"was the model sharded .* after the optimizer was built"):
        pool(2).run("tests.integrations.test_accelerate:built_before_sharding", False)


def divided_states(directory: str) -> str:
    """Run by ranks: states divided over DDP's ranks pass through prepare, and are refused by save_state."""
    with on_cpu("ddp"):
        accelerator = Accelerator(cpu=True)
        net = model()
        optimizer = distopt.create_optimizer("muon", net, lr=0.01, process_group=torch.distributed.group.WORLD)
        net, optimizer = accelerator.prepare(net, optimizer)
        tokens = torch.arange(8)[None]
        accelerator.backward(net(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        with pytest.raises(ValueError, match=r"distopt\.checkpoint\.save"):
            optimizer.state_dict()
        distopt.checkpoint.save(directory, model=net, optimizer=optimizer.optimizer)
        return str(distopt.checkpoint.load(directory, model=net, optimizer=optimizer.optimizer))


def test_divided_states_are_saved_natively(tmp_path: Path) -> None:
    assert pool(2).run("tests.integrations.test_accelerate:divided_states", str(tmp_path / "saved")) == ["{}", "{}"]
