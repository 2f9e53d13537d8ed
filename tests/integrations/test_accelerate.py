"""Accelerate: what `prepare` is handed, and when. How it trains is in `test_trainers.py`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import distopt
from tests.distributed.pool import RankError, pool

pytest.importorskip("accelerate", minversion="1.13")
pytest.importorskip("transformers")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

from tests.integrations.training import (
    accelerate,
    build,
    equal,
    furthest,
    is_zero,
    model,
    moved,
    on_cpu,
    plugin,
    ranks_of,
    zero_config,
)

RUN = "tests.integrations.training:accelerate"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_environment_stays() -> Any:
    before = dict(os.environ)
    yield
    for key in os.environ.keys() - before.keys():
        del os.environ[key]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_a_class_over_bare_parameters_trains_as_one_process(name: str, kind: str) -> None:
    alone = accelerate("one", name)
    assert moved(alone)
    assert furthest(alone, pool(2).run(RUN, kind, name)[0]) <= 1e-5


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "muon", "soap"])
def test_a_full_state_dict_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    options = {"steps": 6, "directory": str(tmp_path), "save_at": 3, "state_dict_type": "FULL_STATE_DICT"}
    through = pool(2).run(RUN, "fsdp2", name, **options)[0]
    assert equal(through, pool(2).run(RUN, "fsdp2", name, resume=True, **options)[0])


# ---- before parameters are final


def allocated_by_prepare(name: str) -> bool:
    """Run by ranks: whether anything was bound before the first step."""
    with on_cpu("fsdp2"):
        accelerator = Accelerator(fsdp_plugin=plugin("SHARDED_STATE_DICT"))
        net = model()
        optimizer = build("fsdp2", name, net)
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


# ---- by the plugin


def built_by_the_line(kind: str, options: dict[str, Any], zero: dict[str, Any], more: dict[str, Any]) -> str:
    """Run by ranks: the class of what the one line builds and what `prepare` makes of it, or what is said."""
    with on_cpu(kind):
        chosen: dict[str, Any] = {"cpu": True}
        if is_zero(kind):
            config = zero_config(kind, train_micro_batch_size_per_gpu=1, **more)
            config["zero_optimization"] |= zero
            handlers = [InitProcessGroupKwargs(backend="gloo")]
            chosen = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config), "kwargs_handlers": handlers}
        accelerator = Accelerator(**chosen)
        net = model()
        try:
            optimizer = distopt.integrations.accelerate.create_optimizer("muon", net, lr=0.01, **options)
        except ValueError as refused:
            return str(refused)
        net, prepared = accelerator.prepare(net, optimizer)
        inner = net.basic_optimizer if is_zero(kind) else prepared.optimizer
        assert inner is optimizer
        if is_zero(kind):
            net.destroy()
        return type(inner).__name__


BUILT = "tests.integrations.test_accelerate:built_by_the_line"
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("kind", "options", "zero", "more", "found"),
    [
        ("ddp", {}, {}, {}, "Muon"),
        ("zero2", {}, {}, {}, "ClientOptimizer"),
        ("zero2", {}, OFFLOADED, {}, "ClientOptimizer"),  # which Accelerate would exchange for DeepSpeed's Adam
        ("zero2", {}, OFFLOADED, {"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer"),
        ("zero2", {}, {"zero_hpz_partition_size": 2}, {}, "zero_hpz_partition_size' was not tested"),
        ("zero2", {}, {}, {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "sets up an optimizer too"),
        ("zero2", {"max_grad_norm": 1.0}, {}, {}, "set gradient_clipping in the DeepSpeed config"),
    ],
)
def test_one_line_is_right_under_every_plugin(
    kind: str, options: dict[str, Any], zero: dict[str, Any], more: dict[str, Any], found: str
) -> None:
    if is_zero(kind):
        pytest.importorskip("deepspeed", minversion="0.19.8")
    for said in ranks_of(kind, 2).run(BUILT, kind, options, zero, more):
        assert found in said


def test_the_line_wants_the_accelerator_first() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="make the Accelerator before the optimizer"):
        distopt.integrations.accelerate.create_optimizer("muon", model(), lr=0.01)


def test_a_missing_accelerate_names_what_to_install() -> None:
    code = "import sys; sys.modules['accelerate'] = None\nimport distopt\ndistopt.integrations.accelerate"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "needs accelerate >= 1.13; pip install 'distopt[accelerate]'" in done.stderr


def wrapped_by_fsdp1(name: str) -> str:
    """Run by ranks, what `prepare` does under FSDP1: the model is flattened after its optimizer was made."""
    net = model()
    optimizer = distopt.create_optimizer(name, net, lr=0.01)
    wrapped = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    tokens = torch.arange(8)[None]
    wrapped(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(ValueError, match="FSDP1") as caught:
        optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_fsdp1_after_the_optimizer_is_refused(name: str) -> None:
    for said in pool(2).run("tests.integrations.test_accelerate:wrapped_by_fsdp1", name):
        assert "build the optimizer afterwards" in said
