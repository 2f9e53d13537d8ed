"""The optimizers behave as torch.optim's, in one process: groups, schedulers, scalers, state dicts, hooks, copies."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"lr": 0.01},
    "Lion": {"lr": 0.01},
    "Adafactor": {"lr": 0.01},
    "Muon": {"lr": 0.01},
    "SOAP": {"lr": 0.01, "precondition_frequency": 2},
}
SHAPES = {"up": (12, 8), "conv": (4, 3, 2, 2), "experts": (2, 5, 6), "down": (8, 12), "norm": (9,), "scale": ()}
every_rule = pytest.mark.parametrize("name", OPTIONS)


def params_for(name: str, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """One parameter of each shape that the rule takes."""
    generator = torch.Generator().manual_seed(1)
    return {
        key: nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype))
        for key, shape in SHAPES.items()
        if name != "Muon" or len(shape) > 1
    }


def build(name: str, params: dict[str, nn.Parameter], **options: Any) -> distopt.Optimizer:
    built: distopt.Optimizer = getattr(distopt, name)(params.items(), **{**OPTIONS[name], **options})
    return built


def set_grads(params: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def everything(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all weights and states."""
    found = {key: param.detach().clone() for key, param in params.items()}
    for key, param in params.items():
        found |= {f"{key}/{state}": value.clone() for state, value in optimizer.state[param].items()}
    return found


def changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert set(before) == set(after)
    return [name for name in before if not torch.equal(before[name], after[name])]


# ---- schedulers, scalers, closures, hooks


@every_rule
def test_a_schedule_sets_the_lr_of_each_group(name: str) -> None:
    params = params_for(name)
    first, *rest = params.items()
    optimizer = getattr(distopt, name)([{"params": [first], "lr": 1.0}, {"params": rest}], **OPTIONS[name])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.0, lambda step: 0.5**step])
    lr = OPTIONS[name]["lr"]
    before = first[1].detach().clone()
    for step in range(3):
        assert [group["lr"] for group in optimizer.param_groups] == [0.0, lr * 0.5**step]
        train(params, optimizer, range(step, step + 1))
        schedule.step()
    assert torch.equal(first[1], before), "its lr is zero"
    assert not torch.equal(rest[0][1], params_for(name)[rest[0][0]])


@pytest.mark.parametrize(("name", "option"), [("AdamW", "betas"), ("SGD", "momentum")])
def test_one_cycle_moves_lr_and_momentum_as_for_torch(name: str, option: str) -> None:
    ours, theirs = params_for(name), params_for(name)
    mine, other = build(name, ours), getattr(torch.optim, name)(theirs.values(), **OPTIONS[name])
    schedules = [torch.optim.lr_scheduler.OneCycleLR(each, max_lr=0.1, total_steps=6) for each in (mine, other)]
    seen = set()
    for step in range(5):
        for params, optimizer, schedule in zip((ours, theirs), (mine, other), schedules):
            train(params, optimizer, range(step, step + 1))
            schedule.step()
        assert mine.param_groups[0][option] == other.param_groups[0][option]
        assert mine.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        seen.add(mine.param_groups[0][option])
    assert len(seen) > 2
    for key, param in ours.items():
        torch.testing.assert_close(param, theirs[key], rtol=1e-5, atol=1e-6)


def test_a_schedule_resumes_from_a_state_dict() -> None:
    params = params_for("AdamW")
    optimizer = build("AdamW", params)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    for step in range(4):
        train(params, optimizer, range(step, step + 1))
        schedule.step()
    resumed = build("AdamW", params_for("AdamW"))
    resumed.load_state_dict(optimizer.state_dict())
    again = torch.optim.lr_scheduler.OneCycleLR(resumed, max_lr=0.1, total_steps=9, last_epoch=schedule.last_epoch - 1)
    again.load_state_dict(schedule.state_dict())
    for _ in range(4):
        for each in (schedule, again):
            each.optimizer.step = lambda: None
            each.step()
        assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@every_rule
def test_grad_scaler_skips_everything_on_an_infinity_and_unscales_otherwise(name: str) -> None:
    params, plain_params = params_for(name), params_for(name)
    optimizer, plain = build(name, params), build(name, plain_params)
    train(params, optimizer, range(1))
    train(plain_params, plain, range(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    before = everything(params, optimizer)
    for step, bad in ((1, True), (2, False)):
        scaler.scale(torch.zeros(()))
        set_grads(params, step)
        for param in params.values():
            assert param.grad is not None
            param.grad.mul_(scaler.get_scale())
        if bad:
            params["up"].grad[3, 3] = float("inf")  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert changes(before, everything(params, optimizer)) == []
            assert optimizer.skipped_steps == 1
            assert scaler.get_scale() == 512.0
    train(plain_params, plain, range(2, 3))
    assert changes(everything(params, optimizer), everything(plain_params, plain)) == []
    assert optimizer.skipped_steps == 1


def test_gradients_unscaled_by_the_scaler_are_clipped_by_their_true_norm() -> None:
    params, plain_params = params_for("AdamW"), params_for("AdamW")
    optimizer, plain = (build("AdamW", p, max_grad_norm=0.5) for p in (params, plain_params))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.zeros(()))
    set_grads(params, 0)
    for param in params.values():
        assert param.grad is not None
        param.grad.mul_(256.0)
    scaler.step(optimizer)
    train(plain_params, plain, range(1))
    assert optimizer.last_grad_norm == pytest.approx(plain.last_grad_norm, rel=1e-6)
    for key, param in params.items():
        torch.testing.assert_close(param, plain_params[key], rtol=1e-6, atol=1e-8)


@every_rule
def test_a_bad_gradient_raises_or_skips_and_changes_nothing(name: str) -> None:
    for option in ("raise", "skip"):
        params = params_for(name)
        optimizer = build(name, params, nonfinite=option)
        train(params, optimizer, range(2))
        before = everything(params, optimizer)
        set_grads(params, 2)
        params["down"].grad[0, 0] = float("nan")  # type: ignore[index]
        if option == "raise":
            with pytest.raises(ValueError, match="'down' is not finite"):
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.skipped_steps == (option == "skip")
        assert changes(before, everything(params, optimizer)) == []


def test_a_closure_is_called_with_gradients_enabled_and_its_loss_returned() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = distopt.SGD([param], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert torch.allclose(param, torch.full((4,), 0.8))


def test_zero_grad_sets_to_none_or_to_zero() -> None:
    params = params_for("AdamW")
    optimizer = build("AdamW", params)
    set_grads(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None and not param.grad.any() for param in params.values())
    optimizer.zero_grad()
    assert all(param.grad is None for param in params.values())


def test_hooks_around_steps_and_state_dicts_are_called() -> None:
    params = params_for("AdamW")
    optimizer = build("AdamW", params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: calls.append(f"load pre {state.pop('extra')}")  # type: ignore[func-returns-value]
    )
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load post"))
    train(params, optimizer, range(1))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert calls == ["step pre", "step post", "save pre", "load pre 1", "load post"]
    assert saved["extra"] == 1, "loading does not change what it is given"


# ---- groups


@every_rule
def test_a_group_added_later_trains_and_keeps_the_states_of_the_others(name: str) -> None:
    params, reference_params = params_for(name), params_for(name)
    first = dict(list(params.items())[:1])
    rest = dict(list(params.items())[1:])
    optimizer = build(name, first)
    train(first, optimizer, range(3))
    before = everything(first, optimizer)
    optimizer.add_param_group({"params": list(rest.items())})
    assert changes(before, everything(first, optimizer)) == []
    assert optimizer.param_groups[1]["lr"] == OPTIONS[name]["lr"]
    assert not any(bool(optimizer.state[param]["step"]) for param in rest.values())
    train(params, optimizer, range(3, 6))

    reference_first = dict(list(reference_params.items())[:1])
    late = dict(list(reference_params.items())[1:])
    alone, other = build(name, reference_first), build(name, late)
    train(reference_first, alone, range(3))
    for step in range(3, 6):
        set_grads(reference_params, step)
        alone.step()
        other.step()
    assert [key for key, param in params.items() if not torch.equal(param, reference_params[key])] == []


def test_a_group_added_before_the_first_step_has_its_own_rule_and_options() -> None:
    params = params_for("AdamW")
    optimizer = distopt.Muon([("up", params["up"])], lr=0.02)
    optimizer.add_param_group({"params": [("norm", params["norm"])], "rule": "adamw", "betas": (0.8, 0.9)})
    group = optimizer.param_groups[1]
    assert group["rule"] == "adamw"
    assert group["betas"] == (0.8, 0.9)
    assert group["lr"] == 0.02, "lr and weight decay are the optimizer's"
    assert "momentum" not in group
    subset = {key: params[key] for key in ("up", "norm")}
    train(subset, optimizer, range(2))
    assert set(optimizer.state[params["norm"]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[params["up"]]) == {"step", "momentum_buffer"}


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    params = params_for("AdamW")
    optimizer = distopt.Muon([("up", params["up"])], lr=0.02)
    train({"up": params["up"]}, optimizer, range(1))
    with pytest.raises(ValueError, match=r"'norm': Muon needs a matrix.*adamw"):
        optimizer.add_param_group({"params": [("norm", params["norm"])]})
    assert len(optimizer.param_groups) == 1
    train({"up": params["up"]}, optimizer, range(1))


# ---- copies and state dicts


@every_rule
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_continue_bit_for_bit_and_share_nothing(name: str, way: str) -> None:
    params = params_for(name)
    optimizer = build(name, params)
    train(params, optimizer, range(3))
    both = (params, optimizer)
    copied_params, copied = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert type(copied) is type(optimizer)
    before = everything(params, optimizer)
    train(copied_params, copied, range(3, 6))
    assert changes(before, everything(params, optimizer)) == []
    train(params, optimizer, range(3, 6))
    assert changes(everything(params, optimizer), everything(copied_params, copied)) == []


@every_rule
@pytest.mark.parametrize("named", [True, False])
def test_a_state_dict_round_trip_continues_bit_for_bit(name: str, named: bool) -> None:
    params, again = params_for(name), params_for(name)
    make: Callable[[dict[str, nn.Parameter]], Any] = lambda p: p.items() if named else p.values()  # noqa: E731
    optimizer = getattr(distopt, name)(make(params), **OPTIONS[name])
    resumed = getattr(distopt, name)(make(again), **{**OPTIONS[name], "lr": 0.5})
    train(params, optimizer, range(3))
    train(again, resumed, range(7, 8))
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for key, param in again.items():
            param.copy_(params[key])
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == OPTIONS[name]["lr"]
    assert changes(everything(params, optimizer), everything(again, resumed)) == []
    train(params, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert changes(everything(params, optimizer), everything(again, resumed)) == []


@every_rule
def test_a_state_dict_survives_torch_save(name: str, tmp_path: Any) -> None:
    params = params_for(name)
    optimizer = build(name, params)
    train(params, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = build(name, params)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert changes(everything(params, optimizer), everything(params, fresh)) == []


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "Muon"])
def test_state_dicts_of_torch_are_loaded_and_training_goes_on(name: str) -> None:
    theirs = {key: param for key, param in params_for(name).items() if name != "Muon" or param.ndim == 2}
    other = getattr(torch.optim, name)(theirs.values(), **OPTIONS[name])
    train(theirs, other, range(3))
    ours = {key: nn.Parameter(param.detach().clone()) for key, param in theirs.items()}
    optimizer = getattr(distopt, name)(ours.values(), **{**OPTIONS[name], "lr": 0.7})
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == OPTIONS[name]["lr"]
    for key, param in ours.items():
        for state, value in other.state[theirs[key]].items():
            assert torch.equal(optimizer.state[param][state], value), f"{key}/{state}"
    before = {key: param.detach().clone() for key, param in ours.items()}
    train(theirs, other, range(3, 5))
    train(ours, optimizer, range(3, 5))
    # torch's Muon iterates in bf16, and so does not reach float32's agreement.
    limit = 3e-2 if name == "Muon" else 1e-5
    for key, param in ours.items():
        change = (theirs[key] - before[key]).norm()
        assert (param - theirs[key]).norm() <= limit * change, key


@pytest.mark.parametrize("source", ["torch", "distopt"])
def test_states_of_bf16_parameters_stay_fp32_through_a_load(source: str) -> None:
    params = params_for("AdamW", torch.bfloat16)
    optimizer = build("AdamW", params)
    if source == "torch":  # whose states are bf16, as its parameters are
        other = torch.optim.AdamW(params.values(), lr=0.01)
        train(params, other, range(2))
        optimizer = distopt.AdamW(params.values(), lr=0.01)
        optimizer.load_state_dict(other.state_dict())
    else:
        train(params, optimizer, range(2))
        before = everything(params, optimizer)
        optimizer = build("AdamW", params)
        optimizer.load_state_dict(copy.deepcopy(build_and_load(before, params)))
        assert changes(before, everything(params, optimizer)) == []
    for param in params.values():
        assert optimizer.state[param]["exp_avg"].dtype is torch.float32
        assert optimizer.state[param]["exp_avg_sq"].dtype is torch.float32
        assert optimizer.state[param]["exp_avg"].any()


def build_and_load(states: dict[str, Tensor], params: dict[str, nn.Parameter]) -> dict[str, Any]:
    """A state dict of these values."""
    saved = build("AdamW", params).state_dict()
    for index, key in enumerate(params):
        saved["state"][index] = {s: states[f"{key}/{s}"] for s in ("step", "exp_avg", "exp_avg_sq")}
    return saved


def test_a_state_dict_of_another_rule_is_refused_and_nothing_changes() -> None:
    params = params_for("AdamW")
    saved = build("Lion", params).state_dict()
    optimizer = build("AdamW", params)
    train(params, optimizer, range(1))
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match=r"saved by rule 'lion', here it is 'adamw'"):
        optimizer.load_state_dict(saved)
    assert changes(before, everything(params, optimizer)) == []


# ---- parameters of every kind


@every_rule
def test_a_missing_gradient_leaves_parameter_and_state_alone(name: str) -> None:
    params = params_for(name)
    optimizer = build(name, params)
    train(params, optimizer, range(2))
    before = everything(params, optimizer)
    set_grads(params, 2)
    params["up"].grad = None
    optimizer.step()
    changed = changes(before, everything(params, optimizer))
    assert [key for key in changed if key.startswith("up")] == []
    assert "down" in changed


@every_rule
def test_frozen_parameters_are_carried_along(name: str) -> None:
    params = params_for(name)
    params["down"].requires_grad_(False)
    optimizer = build(name, params)
    before = params["down"].detach().clone()
    trained = {key: param for key, param in params.items() if key != "down"}
    train(trained, optimizer, range(2))
    assert torch.equal(params["down"], before)
    assert params["down"] in optimizer.state
    params["down"].requires_grad_(True)
    train(params, optimizer, range(2, 5))
    assert not torch.equal(params["down"], before)


@every_rule
def test_parameters_without_elements_and_without_dims_are_served(name: str) -> None:
    params = {"none": nn.Parameter(torch.zeros(0, 4)), "some": nn.Parameter(torch.ones(3, 4))}
    if name != "Muon":
        params["scalar"] = nn.Parameter(torch.ones(()))
    optimizer = build(name, params)
    train(params, optimizer, range(3))
    assert not torch.equal(params["some"], torch.ones(3, 4))
    if name != "Muon":
        assert params["scalar"].item() != 1.0
    again = build(name, params)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert changes(everything(params, optimizer), everything(params, again)) == []


@every_rule
def test_channels_last_weights_get_the_update_of_contiguous_ones(name: str) -> None:
    plain = {"conv": nn.Parameter(torch.randn(4, 3, 5, 5))}
    last = {"conv": nn.Parameter(plain["conv"].detach().clone().to(memory_format=torch.channels_last))}
    first, second = build(name, plain), build(name, last)
    for step in range(3):
        set_grads(plain, step)
        assert plain["conv"].grad is not None
        last["conv"].grad = plain["conv"].grad.to(memory_format=torch.channels_last)
        first.step()
        second.step()
    assert torch.equal(plain["conv"], last["conv"])
    assert last["conv"].is_contiguous(memory_format=torch.channels_last)
    assert changes(everything(plain, first), everything(last, second)) == []


@every_rule
def test_maximize_ascends_where_minimize_descends(name: str) -> None:
    up, down = params_for(name), params_for(name)
    ascending = build(name, up, maximize=True)
    descending = build(name, down)
    for step in range(3):
        set_grads(up, step)
        set_grads(down, step)
        for param in down.values():
            assert param.grad is not None
            param.grad.neg_()
        ascending.step()
        descending.step()
    assert [key for key, param in up.items() if not torch.equal(param, down[key])] == []
    assert not torch.equal(up["up"], params_for(name)["up"])


def test_maximize_leaves_the_users_gradient_as_it_is() -> None:
    params = params_for("AdamW")
    optimizer = build("AdamW", params, maximize=True)
    set_grads(params, 0)
    before = {key: param.grad.clone() for key, param in params.items() if param.grad is not None}
    optimizer.step()
    assert [key for key, param in params.items() if not torch.equal(param.grad, before[key])] == []  # type: ignore[arg-type]


@every_rule
def test_lr_may_be_a_tensor_that_changes(name: str) -> None:
    tensors, floats = params_for(name), params_for(name)
    lr = torch.tensor(0.01)
    first, second = build(name, tensors, lr=lr), build(name, floats, lr=lr.item())
    train(tensors, first, range(2))
    train(floats, second, range(2))
    lr.fill_(0.5)
    second.param_groups[0]["lr"] = 0.5
    train(tensors, first, range(2, 3))
    train(floats, second, range(2, 3))
    assert [key for key, param in tensors.items() if not torch.equal(param, floats[key])] == []


# ---- bad input


@every_rule
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_a_bad_hyperparameter_is_an_error_at_construction_and_when_set_later(
    name: str, option: str, value: float
) -> None:
    params = params_for(name)
    with pytest.raises(ValueError, match=option):
        build(name, params, **{option: value})
    optimizer = build(name, params)
    train(params, optimizer, range(1))
    before = everything(params, optimizer)
    optimizer.param_groups[0][option] = value
    set_grads(params, 1)
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    assert changes(before, everything(params, optimizer)) == []


@every_rule
def test_an_unknown_option_is_an_error_with_the_nearest_name(name: str) -> None:
    params = params_for(name)
    with pytest.raises(TypeError, match=r"no option 'weight_decy'; did you mean 'weight_decay'"):
        build(name, params, weight_decy=0.1)
    with pytest.raises(TypeError, match=r"no option 'max_gradnorm'; did you mean 'max_grad_norm'"):
        build(name, params, max_gradnorm=0.1)
    with pytest.raises(ValueError, match=r"no option 'weight_decy'; did you mean 'weight_decay'"):
        getattr(distopt, name)([{"params": params.values(), "weight_decy": 0.1}])


@pytest.mark.parametrize("option", ["foreach", "capturable", "differentiable", "fused"])
def test_options_of_torch_without_meaning_are_warned_about(option: str) -> None:
    with pytest.warns(UserWarning, match=option):
        distopt.AdamW([nn.Parameter(torch.ones(2))], **{option: True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distopt.AdamW([nn.Parameter(torch.ones(2))], **{option: False})
        distopt.AdamW([nn.Parameter(torch.ones(2))], **{option: None})


@pytest.mark.parametrize(
    ("option", "value"),
    [("nonfinite", "ignore"), ("missing_grad", "skip"), ("max_grad_norm", 0.0), ("max_grad_norm", -1)],
)
def test_a_bad_engine_option_is_an_error_that_names_it(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        distopt.AdamW([nn.Parameter(torch.ones(2))], **{option: value})


@every_rule
@pytest.mark.parametrize("kind", ["sparse", "complex", "meta", "integer"])
def test_parameters_that_no_rule_can_serve_are_refused_by_name(name: str, kind: str) -> None:
    bad = {
        "sparse": lambda: nn.Parameter(torch.eye(4).to_sparse()),
        "complex": lambda: nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)),
        "meta": lambda: nn.Parameter(torch.ones(4, 4, device="meta")),
        "integer": lambda: nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False),
    }[kind]()
    with pytest.raises(ValueError, match="'odd'"):
        getattr(distopt, name)([("good", nn.Parameter(torch.ones(4, 4))), ("odd", bad)], **OPTIONS[name])


def test_a_sparse_gradient_is_refused_by_name_and_nothing_changes() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = distopt.AdamW(embedding.named_parameters(), lr=0.1)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"'weight' has a sparse gradient"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


def test_an_empty_parameter_list_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        distopt.AdamW([])


def test_what_create_optimizer_makes_is_of_the_public_class_and_pickles() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = distopt.create_optimizer("muon", model, lr=0.1)
    assert isinstance(optimizer, distopt.Muon)
    assert type(pickle.loads(pickle.dumps(optimizer))) is distopt.Muon


def test_plausible_mistakes_are_named() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="takes the model itself"):
        distopt.create_optimizer("muon", model.parameters(), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr must be a number, got '3e-4'"):
        distopt.AdamW(model.parameters(), lr="3e-4")
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        distopt.create_optimizer("AdamW", model, lr=0.1)
    with pytest.raises(TypeError, match="load its state_dict"):
        copy.deepcopy(distopt.LBFGS(model.parameters()))


def test_gradients_that_were_made_in_inference_mode_are_stepped() -> None:
    param = nn.Parameter(torch.zeros(4))
    built = distopt.SGD([("a", param)], lr=1.0)
    with torch.inference_mode():
        param.grad = torch.ones(4)
    for _ in range(2):
        built.step()
    assert torch.equal(param, torch.full((4,), -2.0))
