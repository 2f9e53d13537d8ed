"""`state_bytes` is what optimizers allocate: every rule, on one process and on ranks of every kind of layout."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distopt
from distopt.layouts import local_tensor
from distopt.quasi_newton import DRIVERS
from distopt.rules import RULES
from distopt.state.codecs import CODECS
from tests.distributed.layouts import BLOCKS, DISTINCT, LAYOUTS, Full, lay_out
from tests.distributed.pool import pool

HERE = __name__
SHAPES = {**DISTINCT, "experts": (3, 12, 8), "conv": (6, 4, 3, 3), "embed": (50, 16), "again": (24, 24)}
LAYERS = {
    f"layers.{name}.weight": shape
    for name, shape in {
        "q_proj": (18, 24), "o_proj": (24, 18), "up_proj": (50, 24), "down_proj": (24, 50), "norm": (24,),
    }.items()
}  # fmt: skip


def holder(params: Full) -> nn.Module:
    model = nn.Module()
    for name, param in params.items():
        model.register_parameter(name, param)  # type: ignore[arg-type]
    return model


def model_of(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    return holder({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})


def allocated(optimizer: Any) -> int:
    """Bytes of the tensors that states lie in. The slab of an elementwise group is longer than the states in it by what
    fills its last 16 elements: there the states are counted, elsewhere storages."""
    total, storages = 0, {}
    for group in optimizer._bind().groups:
        states = [tensor for window in group.windows for tensor in window.state.values()]
        units = getattr(group, "units", None)
        total += sum(store.nbytes for unit in (units.units if units else []) for store in unit.stores.values())
        if group.plan.elementwise:
            total += sum(tensor.nbytes for tensor in states)
            continue
        slabs = [slab for bucket in group.buckets for slab in (*bucket.slabs, *bucket.owned_slabs)]
        for tensor in states + [tensor for slab in slabs for tensor in slab.tensors.values()]:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return total + sum(storages.values())


@pytest.mark.parametrize("name", RULES)
def test_formula_is_what_one_process_allocates(name: str) -> None:
    model = model_of({key: shape for key, shape in SHAPES.items() if name != "amos" or key != "conv"})  # it refuses it
    optimizer = distopt.create_optimizer(name, model, lr=0.1)
    assert distopt.state_bytes(name, model) == allocated(optimizer) == optimizer.plan.summary()["state_bytes"]


@pytest.mark.parametrize("codec", CODECS)
def test_formula_knows_codecs(codec: str) -> None:
    model = model_of({**SHAPES, "wide": (180, 130)})
    plain = distopt.state_bytes("adamw", model)
    optimizer = distopt.create_optimizer("adamw", model, lr=0.1, state_codec=codec)
    found = distopt.state_bytes("adamw", model, state_codec=codec)
    assert found == allocated(optimizer)
    assert found == plain if codec == "fp32" else found < 0.7 * plain


@pytest.mark.parametrize(
    "options",
    [
        {"master_codec": "fp32"},
        {"state_codec": {"momentum_buffer": "int8"}},
        {"state_codec": "int8", "rest_options": {"state_codec": "bf16"}},
    ],
)
def test_formula_completes_groups_of_another_rule_as_optimizers_do(options: dict[str, Any]) -> None:
    model = model_of({"embed": (100, 64), "hidden": (96, 64)}).bfloat16()
    built = distopt.create_optimizer("muon", model, lr=0.1, **options)
    assert distopt.state_bytes("muon", model, **options) == built.plan.summary()["state_bytes"]


def test_formula_refuses_options_that_there_are_not() -> None:
    with pytest.raises(TypeError, match="did you mean 'amsgrad'"):
        distopt.state_bytes("adamw", model_of(SHAPES), amsgrd=True)


def compared(layout: str) -> list[tuple[str, int, int]]:
    """(rule, formula, allocated bytes) on this rank, where they differ; and what all of them take together."""
    chosen = LAYOUTS[layout]
    differing, seen = [], 0
    for name in RULES:
        full = {key: torch.zeros(shape) for key, shape in chosen.shapes.items()}
        model = holder(lay_out(chosen, full).params)
        options = chosen.options()
        optimizer = distopt.create_optimizer(name, model, lr=0.1, **options)
        found = allocated(optimizer)
        formula = distopt.state_bytes(name, model, partition="process_group" in options)
        seen += found
        if formula != found:
            differing.append((name, formula, found))
    assert seen > 0
    return differing


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ("distributed", 4), ("fsdp-repeated", 2), ("columns", 4), ("hsdp", 4), ("tp", 2), ("fsdp-tp", 4),
        ("experts-fsdp", 4), ("partitioned", 4), ("partitioned-repeated", 2), ("flat", 4), ("flat-experts", 2),
        ("flat-concatenated", 4), ("distributed-replicate", 2),
    ],
)  # fmt: skip
def test_formula_is_what_every_rank_allocates(layout: str, world_size: int) -> None:
    assert pool(world_size).run(f"{HERE}:compared", layout) == [[]] * world_size


def live(name: str) -> int:
    """The formula for parameters that FSDP2 has sharded."""
    model = holder(lay_out(LAYOUTS["fsdp"], {key: torch.zeros(shape) for key, shape in DISTINCT.items()}).params)
    return distopt.state_bytes(name, model)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "soap"])
def test_a_mesh_on_paper_takes_what_ranks_take(name: str) -> None:
    model = model_of(DISTINCT)
    found = [distopt.state_bytes(name, model, layout="dp=4", on_rank=rank) for rank in range(4)]
    assert found == pool(4).run(f"{HERE}:live", name)
    copies = [distopt.state_bytes(name, model, layout="replicate=2,dp=4", on_rank=rank) for rank in range(8)]
    assert copies == found * 2
    cut = [distopt.state_bytes(name, LAYERS, layout="dp=2,tp=2", on_rank=rank) for rank in range(4)]
    assert len(set(cut)) > 1 or name == "soap"
    whole = distopt.state_bytes(name, LAYERS)
    assert whole <= sum(cut) <= 4 * whole  # norms are on each rank of tp, statistics on each that has a part
    parted = [distopt.state_bytes(name, LAYERS, layout="replicate=3", partition=True, on_rank=r) for r in range(3)]
    # Every replica that has a part of a matrix keeps statistics of it.
    assert whole <= sum(parted) <= (3 if name == "adafactor" else 1.1) * whole


def vectors_and_matrices(optimizer: Any) -> int:
    """Bytes of a quasi-Newton method's states, of which vectors lie as the parameters do."""
    states = [local_tensor(state) for entry in optimizer.state.values() for state in entry.values()]
    return sum(state.nbytes for state in states)


@pytest.mark.parametrize("name", DRIVERS)
def test_quasi_newton_methods_keep_what_the_formula_says(name: str) -> None:
    shapes = {"weight": (12, 30), "bias": (12,), "scale": ()}
    optimizer = distopt.create_optimizer(name, model_of(shapes), lr=0.1)
    assert distopt.state_bytes(name, shapes) == vectors_and_matrices(optimizer)
    with pytest.raises(TypeError, match="paged"):
        distopt.state_bytes(name, shapes, offload="cpu")


def quasi_newton_on_a_rank(name: str) -> tuple[int, int]:
    """(by formula, kept) with uneven FSDP2 shards."""
    params = lay_out(LAYOUTS["fsdp"], {n: torch.zeros(shape) for n, shape in DISTINCT.items()}).params
    optimizer = distopt.create_optimizer(name, holder(params), lr=0.1)
    return distopt.state_bytes(name, holder(params)), vectors_and_matrices(optimizer)


@pytest.mark.parametrize("name", ["lbfgs", "ml_bfgs"])
def test_quasi_newton_methods_on_ranks_keep_what_the_formula_says(name: str) -> None:
    answers = pool(4).run(f"{HERE}:quasi_newton_on_a_rank", name)
    assert all(formula == kept for formula, kept in answers), answers
    assert len(set(answers)) > 1


def test_options_and_rest_count() -> None:
    model = model_of(BLOCKS)
    numel = sum(param.numel() for param in model.parameters())
    vectors = 48
    assert distopt.state_bytes("adamw", BLOCKS) == 8 * numel
    assert distopt.state_bytes("adamw", BLOCKS, amsgrad=True) == 12 * numel
    assert distopt.state_bytes("muon", model) == 4 * (numel - vectors) + 8 * vectors
    assert distopt.state_bytes("muon", model, rest="lion") == 4 * numel
    assert distopt.state_bytes("galore", model, rank=4) < distopt.state_bytes("galore", model, rank=8)


def test_what_cannot_be_answered_is_refused() -> None:
    for arguments, message in (
        ({"name": "lbfg"}, "no optimizer is called 'lbfg', did you mean 'lbfgs'"),
        ({"name": "bfgs"}, "at most 2,048; use LBFGS"),
        ({"name": "adamw", "layout": "pp=2"}, "no axis 'pp'"),
        ({"name": "adamw", "layout": "dp=2", "on_rank": 2}, "on_rank=2: there are 2 ranks"),
        ({"name": "adamw", "state_codec": "int9"}, "did you mean 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            distopt.state_bytes(model_or_shapes=BLOCKS, **arguments)
    assert not dist.is_initialized()
