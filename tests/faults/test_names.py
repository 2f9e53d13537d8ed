"""Parameters are known by their names: reordered, renamed, added, tied, wrapped, sharded later, never mixed up."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distopt
from distopt import checkpoint
from distopt.checkpoint import CheckpointError
from distopt.names import parameter_names
from tests.distributed.layouts import ranks_mesh
from tests.distributed.pool import pool

HERE = __name__


class Net(nn.Module):
    """Two hidden matrices of one shape, a norm, an embedding tied to the head."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.second(self.norm(self.first(hidden)).relu())
        result: Tensor = self.lm_head(hidden)
        return result


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 0) -> None:
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()


def built(**options: Any) -> tuple[Net, distopt.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    return model, distopt.AdamW(model.named_parameters(), lr=0.01, **options)


def trained(steps: int = 2) -> tuple[Net, distopt.Optimizer]:
    model, optimizer = built()
    for number in range(steps):
        step(model, optimizer, number)
    return model, optimizer


# ---- order


def test_reordered_parameters_of_one_shape_get_their_own_states_back() -> None:
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    again = copy.deepcopy(model)
    other = distopt.AdamW(list(again.named_parameters())[::-1], lr=0.01)
    other.load_state_dict(saved)
    assert not torch.equal(
        optimizer.state[model.first.weight]["exp_avg"], optimizer.state[model.second.weight]["exp_avg"]
    )
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            assert torch.equal(other.state[again.get_parameter(name)][key], value), f"{name}/{key}"


def test_reordered_parameters_of_a_sequential_are_matched_by_name_too() -> None:
    """Its names start with digits, as the positions of bare tensors do."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = distopt.AdamW(model.named_parameters(), lr=0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    other = distopt.AdamW(list(model.named_parameters())[::-1], lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    first, second = model.parameters()
    assert not torch.equal(optimizer.state[first]["exp_avg"], optimizer.state[second]["exp_avg"])
    for param in (first, second):
        assert torch.equal(other.state[param]["exp_avg"], optimizer.state[param]["exp_avg"])


def test_a_native_checkpoint_is_loaded_by_name_whatever_the_order(tmp_path: Any) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path / "saved", model=model, optimizer=optimizer)
    again = Net()
    other = distopt.AdamW(list(again.named_parameters())[::-1], lr=0.5)
    checkpoint.load(tmp_path / "saved", model=again, optimizer=other)
    assert other.param_groups[0]["lr"] == 0.01
    for name, param in model.named_parameters():
        assert torch.equal(again.get_parameter(name), param)
        for key, value in optimizer.state[param].items():
            assert torch.equal(other.state[again.get_parameter(name)][key], value), f"{name}/{key}"


# ---- what does not fit


def load_into(optimizer: distopt.Optimizer, saved: dict[str, Any], message: str) -> None:
    """Loading raises, names what is wrong, and changes nothing."""
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entry in before["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in entry.items())


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq"])
def test_a_state_of_another_shape_is_refused_by_name(state: str) -> None:
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    index = saved["param_groups"][0]["param_names"].index("second.weight")
    saved["state"][index][state] = torch.zeros(8, 9)
    load_into(trained(1)[1], saved, rf"'second.weight': state '{state}' has shape \(8, 9\), expected \(8, 8\)")


def test_renamed_added_and_removed_parameters_are_an_error_with_the_difference() -> None:
    model, optimizer = trained()
    saved = optimizer.state_dict()
    named = dict(model.named_parameters())
    renamed = {("third.weight" if name == "second.weight" else name): param for name, param in named.items()}
    load_into(distopt.AdamW(renamed.items(), lr=0.1), saved, r"lacks \['third.weight'\] and has \['second.weight'\]")
    fewer = {name: param for name, param in named.items() if not name.startswith("norm")}
    load_into(distopt.AdamW(fewer.items(), lr=0.1), saved, r"lacks \[\] and has \['norm.weight', 'norm.bias'\]")
    more = {**named, "new": nn.Parameter(torch.ones(3))}
    load_into(distopt.AdamW(more.items(), lr=0.1), saved, r"lacks \['new'\] and has \[\]")


def test_bare_tensors_of_another_number_are_an_error() -> None:
    model, optimizer = trained()
    load_into(distopt.AdamW(list(model.parameters())[:-1], lr=0.1), optimizer.state_dict(), r"has 6 parameters.*has 7")


def test_a_missing_state_is_an_error_that_names_both_sides() -> None:
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]["exp_avg_sq"]
    load_into(trained(1)[1], saved, r"'first.weight'.*\['exp_avg'\].*\['exp_avg', 'exp_avg_sq'\]")


@pytest.mark.parametrize("kind", ["renamed", "fewer", "more", "shape", "groups", "rule"])
def test_a_native_checkpoint_of_another_model_is_refused_before_anything_changes(kind: str, tmp_path: Any) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path / "saved", model=model, optimizer=optimizer)
    torch.manual_seed(1)
    again = Net()
    if kind == "renamed":
        again.third = again.second
        del again.second
    if kind == "fewer":
        del again.norm
    if kind == "more":
        again.extra = nn.Linear(2, 2)
    if kind == "shape":
        again.second = nn.Linear(8, 9)
    named = list(again.named_parameters())
    other = distopt.AdamW(named, lr=0.1)
    if kind == "groups":
        other = distopt.AdamW([{"params": named[:2]}, {"params": named[2:]}], lr=0.1)
    if kind == "rule":
        other = distopt.Lion(named, lr=0.1)
    before = copy.deepcopy(again.state_dict())
    expected = {
        "renamed": "third", "fewer": "norm", "more": "extra", "shape": "second", "groups": "group", "rule": "'adamw'"
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=expected[kind]):
        checkpoint.load(tmp_path / "saved", model=again, optimizer=other)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    assert not any(bool(value.any()) for param in again.parameters() for value in other.state[param].values())
    assert other.param_groups[0]["lr"] == 0.1


# ---- twice


def test_a_parameter_in_two_groups_is_refused_at_construction() -> None:
    param = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        distopt.AdamW([{"params": [param]}, {"params": [param], "lr": 0.1}])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")  # torch's own, before ours
def test_a_parameter_twice_in_a_group_is_refused_at_construction() -> None:
    param, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"'c' is twice in this group, as 'a' before"):
        distopt.AdamW([("a", param), ("b", other), ("c", param)])
    with pytest.raises(ValueError, match="twice"):
        distopt.AdamW([param, other, param])


def test_two_parameters_of_one_name_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="'a'"):
        distopt.AdamW([("a", nn.Parameter(torch.ones(4))), ("a", nn.Parameter(torch.ones(4)))])
    optimizer = distopt.AdamW([("a", nn.Parameter(torch.ones(4)))])
    with pytest.raises(ValueError, match="'a'"):
        optimizer.add_param_group({"params": [("a", nn.Parameter(torch.ones(4)))]})
    assert len(optimizer.param_groups) == 1


# ---- tied weights


def test_tied_weights_are_trained_once_and_saved_under_one_name_with_their_alias(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = distopt.create_optimizer("muon", model, lr=0.01, weight_decay=0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    step(model, optimizer)
    assert model.lm_head.weight is model.embed.weight
    checkpoint.save(tmp_path / "saved", model=model, optimizer=optimizer)
    with checkpoint.Reader(tmp_path / "saved") as reader:
        names = [name for name in reader.names() if name.startswith("model/")]
        assert "model/embed.weight" in names
        assert "model/lm_head.weight" not in names
        assert reader.document["aliases"] == {"lm_head.weight": "embed.weight"}
    again = Net()
    other = distopt.create_optimizer("muon", again, lr=0.01, weight_decay=0.0)
    checkpoint.load(tmp_path / "saved", model=again, optimizer=other)
    assert torch.equal(again.lm_head.weight, model.embed.weight)
    step(model, optimizer, 1)
    step(again, other, 1)
    assert torch.equal(again.lm_head.weight, model.embed.weight)


# ---- wrappers


def test_prefixes_of_wrappers_are_stripped_exactly() -> None:
    def names(*given: str) -> list[str]:
        params = [nn.Parameter(torch.ones(1)) for _ in given]
        return parameter_names([{"params": params, "param_names": list(given)}])

    assert names("module.up.weight") == ["up.weight"]
    assert names("_orig_mod.up.weight") == ["up.weight"]
    assert names("module._orig_mod.blocks.0._checkpoint_wrapped_module.up.weight") == ["blocks.0.up.weight"]
    assert names("blocks.0._orig_mod.up.weight") == ["blocks.0.up.weight"]
    assert names("blocks.module.up.weight") == ["blocks.module.up.weight"]
    assert names("modules.up", "my_orig_mod.up", "up_orig_mod") == ["modules.up", "my_orig_mod.up", "up_orig_mod"]
    with pytest.raises(ValueError, match=r"'up.weight'"):
        names("up.weight", "_orig_mod.up.weight")


def test_names_that_collide_once_prefixes_are_stripped_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"'up.weight'"):
        distopt.AdamW(
            [("up.weight", nn.Parameter(torch.ones(4))), ("_orig_mod.up.weight", nn.Parameter(torch.ones(4)))]
        )


class Wrapped(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.module(tokens)
        return result


def test_states_go_between_wrapped_and_plain_models(tmp_path: Any) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path / "saved", model=model, optimizer=optimizer)
    inner = Net()
    inner.first = checkpoint_wrapper(inner.first)
    wrapped = Wrapped(torch.compile(inner))
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    assert all(name.startswith("module._orig_mod.") for name, _ in wrapped.named_parameters())
    other = distopt.AdamW(wrapped.named_parameters(), lr=0.1)
    checkpoint.load(tmp_path / "saved", model=wrapped, optimizer=other)
    by_state_dict = distopt.AdamW(list(wrapped.named_parameters())[::-1], lr=0.1)
    by_state_dict.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for (name, param), (_, theirs) in zip(model.named_parameters(), wrapped.named_parameters()):
        assert torch.equal(param, theirs), name
        for key, value in optimizer.state[param].items():
            assert torch.equal(other.state[theirs][key], value), f"{name}/{key}"
            assert torch.equal(by_state_dict.state[theirs][key], value), f"{name}/{key}"
    back = distopt.AdamW(Net().named_parameters(), lr=0.1)
    back.load_state_dict(copy.deepcopy(by_state_dict.state_dict()))


# ---- sharded after the optimizer was built


def sharded_later(name: str, bound_before: bool) -> tuple[bool, bool]:
    """create_optimizer before fully_shard: whether all parameters are DTensors, and whether all moved."""
    torch.manual_seed(0)
    model = Net(tied=False)
    optimizer = distopt.create_optimizer(name, model, lr=0.1, weight_decay=0.0)
    if bound_before:
        optimizer.plan.summary()
    fully_shard(model, mesh=ranks_mesh())
    before = {key: param.detach().full_tensor() for key, param in model.named_parameters()}
    step(model, optimizer)
    step(model, optimizer, 1)
    return (
        all(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"]),
        all(not torch.equal(before[key], param.detach().full_tensor()) for key, param in model.named_parameters()),
    )


@pytest.mark.parametrize("bound_before", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon", "soap"])
def test_an_optimizer_created_for_a_model_follows_it_when_it_is_sharded_later(name: str, bound_before: bool) -> None:
    assert pool(2).run(f"{HERE}:sharded_later", name, bound_before) == [(True, True)] * 2


def built_before_sharding() -> str:
    model = Net(tied=False)
    optimizer = distopt.AdamW(model.named_parameters(), lr=0.1)
    fully_shard(model, mesh=ranks_mesh())
    try:
        step(model, optimizer)
    except ValueError as error:
        return str(error)
    return ""


def test_an_optimizer_built_from_parameters_that_are_replaced_never_trains_nothing_silently() -> None:
    for message in pool(2).run(f"{HERE}:built_before_sharding"):
        assert "no parameter of this optimizer has a gradient" in message
        assert "create_optimizer" in message


# ---- routing


def routes(optimizer: distopt.Optimizer) -> dict[str, str]:
    return {name: rule for name, rule, _ in optimizer.routing}


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_of_hidden_layers_go_to_the_matrix_rule_and_the_rest_elsewhere(tied: bool) -> None:
    model = Net(tied)
    optimizer = distopt.create_optimizer(
        "muon", model, lr=0.02, weight_decay=0.1, rest="lion", rest_options={"lr": 0.001, "betas": (0.8, 0.9)}
    )
    found = routes(optimizer)
    hidden = {"first.weight", "second.weight"}
    assert {name for name, rule in found.items() if rule == "muon"} == hidden
    assert found["embed.weight"] == found["norm.weight"] == "lion"
    assert ("lm_head.weight" in found) is not tied
    assert set(found) == {name for name, _ in model.named_parameters()}
    where = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert where["first.weight"]["rule"] == "muon"
    assert where["first.weight"]["lr"] == 0.02
    assert where["first.weight"]["weight_decay"] == 0.1
    assert where["first.weight"]["adjust_lr_fn"] == "match_rms_adamw"
    assert where["embed.weight"]["lr"] == 0.001
    assert where["embed.weight"]["betas"] == (0.8, 0.9)
    assert where["embed.weight"]["weight_decay"] == 0.1
    assert where["norm.weight"]["weight_decay"] == where["first.bias"]["weight_decay"] == 0.0
    step(model, optimizer)


def test_a_rule_for_every_shape_takes_everything() -> None:
    optimizer = distopt.create_optimizer("lion", Net(), lr=0.02)
    assert set(routes(optimizer).values()) == {"lion"}


def test_a_matrix_rule_without_a_matrix_is_an_error() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"no parameter of this Sequential is for muon.*'adamw'"):
        distopt.create_optimizer("muon", model, lr=0.1)


def test_unknown_names_and_options_of_create_optimizer_are_errors_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'mun', did you mean 'muon'"):
        distopt.create_optimizer("mun", Net(), lr=0.1)
    with pytest.raises(ValueError, match=r"'lionn', did you mean 'lion'"):
        distopt.create_optimizer("muon", Net(), lr=0.1, rest="lionn")
    with pytest.raises(TypeError, match=r"'momentun'; did you mean 'momentum'"):
        distopt.create_optimizer("muon", Net(), lr=0.1, momentun=0.9)
    with pytest.raises(ValueError, match=r"'betass'; did you mean 'betas'"):
        distopt.create_optimizer("muon", Net(), lr=0.1, rest_options={"betass": (0.9, 0.9)})


def test_options_for_a_rest_that_does_not_exist_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="rest_options"):
        distopt.create_optimizer("adamw", Net(), lr=0.1, rest_options={"betas": (0.9, 0.9)})
