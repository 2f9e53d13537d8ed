"""Symmetric states of which half is stored, and states of a matrix rule in bf16: bytes, results, state dicts, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.matrix.triangle import packed_rows
from distopt.rule import Shape, TwoSided
from distopt.rules import RULES, rule_class

SIDE = 48
RULE_NAMES = [RULES[name] for name in RULES if issubclass(rule_class(name), TwoSided)]
EVERY_OTHER = {"precondition_frequency": 2, "eps": 1e-2}


def train(built: distopt.Optimizer, weight: nn.Parameter, first: int, steps: int) -> None:
    """Square gradients around a multiple of the identity, so that no factor lacks rank and bases are stable."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        weight.grad = torch.diag(torch.linspace(1, 3, SIDE)) + 0.02 * torch.randn(SIDE, SIDE, generator=generator)
        built.step()


def make(name: str, **options: Any) -> tuple[distopt.Optimizer, nn.Parameter]:
    weight = nn.Parameter(torch.zeros(SIDE, SIDE))
    return getattr(distopt, name)([("w", weight)], **EVERY_OTHER, **options), weight


def held(built: distopt.Optimizer) -> int:
    """Bytes of the storages of all states."""
    found: list[Tensor] = []
    for group in built._bind().groups:
        for bucket in group.buckets:  # type: ignore[union-attr]
            found += [value for slabs in (*bucket.slabs, *bucket.owned_slabs) for value in slabs.tensors.values()]
        for store in group.units.owned.values():
            found += [store.stored, store.scales]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.numel()}.values())


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_half_of_each_symmetric_state_is_stored_as_planned(name: str, codec: str) -> None:
    whole, _ = make(name, state_codec=codec)
    half, weight = make(name, state_codec=codec, packed=True)
    symmetric = [s for s in rule_class(half.rule_name)().states(Shape(SIDE, SIDE)).values() if s.symmetric]
    assert len(symmetric) in (2, 4)
    saved = len(symmetric) * (SIDE - packed_rows(SIDE)) * SIDE * (4 if codec == "fp32" else 2)
    assert whole.plan.summary()["state_bytes"] - half.plan.summary()["state_bytes"] == saved
    train(half, weight, 0, 2)
    assert held(half) == half.plan.summary()["state_bytes"]


@pytest.mark.parametrize(("codec", "limit"), [("fp32", 1e-4), ("bf16", 0.03)])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_training_is_that_of_whole_fp32_states(name: str, codec: str, limit: float) -> None:
    """Both triangles of a product are equal up to rounding; bf16 has 8 bits."""
    kept = [s for s in rule_class(name_of(name))().states(Shape(SIDE, SIDE)) if s.split("_")[0] in ("factor", "gram")]
    changes = []
    for options in ({}, {"packed": True, "state_codec": dict.fromkeys(kept, codec)}):
        built, weight = make(name, lr=0.01, **options)
        train(built, weight, 0, 8)
        changes.append(weight.detach())
    assert (changes[1] - changes[0]).norm() <= limit * changes[0].norm()
    assert not torch.equal(changes[0], torch.zeros(SIDE, SIDE))


@pytest.mark.parametrize("name", RULE_NAMES)
def test_state_dicts_hold_all_of_it_and_go_on_bit_for_bit(name: str) -> None:
    built, weight = make(name, packed=True)
    train(built, weight, 0, 5)
    saved = built.state_dict()
    for key, value in saved["state"][0].items():
        if key.split("_")[0] in ("factor", "gram", "root"):
            assert value.shape == (SIDE, SIDE) and torch.equal(value, value.mT) and value.any()
    again, other = make(name, packed=True)
    other.data.copy_(weight.data)
    again.load_state_dict(saved)
    whole, third = make(name)
    third.data.copy_(weight.data)
    whole.load_state_dict(saved)
    assert not whole.param_groups[0]["packed"], "how states are stored is this optimizer's own"
    for optimizer, param in ((built, weight), (again, other), (whole, third)):
        train(optimizer, param, 5, 4)
    assert torch.equal(other, weight)
    assert torch.allclose(third, weight, atol=1e-5)


def test_packing_where_nothing_is_symmetric_is_an_error() -> None:
    for name in ("AdamW", "Muon", "NorMuon"):
        with pytest.raises(ValueError, match=f"packed: {name} keeps no symmetric matrices"):
            getattr(distopt, name)([nn.Parameter(torch.zeros(4, 4))], packed=True)


def test_packing_changed_after_bind_is_an_error() -> None:
    built, weight = make("SOAP")
    train(built, weight, 0, 1)
    built.param_groups[0]["packed"] = True
    with pytest.raises(ValueError, match="how states are stored was changed after bind"):
        train(built, weight, 1, 1)


def test_the_rest_of_a_model_keeps_its_own_storage() -> None:
    model = nn.Sequential(nn.Linear(40, 48), nn.LayerNorm(48), nn.Linear(48, 40), nn.Linear(40, 3))
    built = distopt.create_optimizer("shampoo", model, lr=1e-3, packed=True, state_codec={"factor_left": "bf16"})
    assert {(g["rule"], g["packed"], str(g["state_codec"])) for g in built.param_groups} == {
        ("shampoo", True, "{'factor_left': 'bf16'}"),
        ("adamw", False, "fp32"),
    }
    model(torch.randn(8, 40)).square().sum().backward()
    built.step()
    assert all(param.isfinite().all() for param in model.parameters())


def name_of(public: str) -> str:
    return next(name for name, cls in RULES.items() if cls == public)
