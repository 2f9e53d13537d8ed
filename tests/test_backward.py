"""Stepping in the backward pass: the same bits as step(), with no gradient left, or an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distopt
from tests.distributed.pool import pool

HERE = "tests.test_backward"
RULES: dict[str, dict[str, Any]] = {
    "lomo": {},
    "adalomo": {},
    "adamw": {},
    "muon": {"rest_options": {"lr": 1e-3}},
    "soap": {"precondition_frequency": 2, "synchronous": True},
    "schedule_free_adamw": {},
    "lion": {"state_codec": "int8"},
}
OFF = {"nonfinite": None}


def model_of(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.Dropout(dropout), nn.Tanh(), nn.Linear(48, 24), nn.Linear(24, 1))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def usual(name: str, model: nn.Module, steps: int = 4, micro: int = 1, **options: Any) -> distopt.Optimizer:
    optimizer = distopt.create_optimizer(name, model, lr=1e-2, weight_decay=0.1, **options)
    for step in range(steps):
        torch.manual_seed(step)
        for part in range(micro):
            loss_of(model, 10 * step + part).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("name", RULES)
def test_parameters_are_stepped_as_usual_and_no_gradient_stays(name: str) -> None:
    model, other = model_of(), model_of()
    usual(name, other, **OFF, **RULES[name])
    optimizer = distopt.create_optimizer(name, model, lr=1e-2, weight_decay=0.1, **OFF, **RULES[name])
    stepper = distopt.step_in_backward(model, optimizer)
    alive: list[int] = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    for step in range(4):
        torch.manual_seed(step)
        loss_of(model, 10 * step).backward()
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()
    assert max(alive) == 0, "each gradient was freed before the next one came"
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))
    stepper.remove()
    loss_of(model, 0).backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("name", ["lomo", "adamw", "muon"])
@pytest.mark.parametrize("micro", [1, 3])
def test_two_passes_clip_by_the_global_norm_exactly(name: str, micro: int) -> None:
    """With dropout: the second pass sees the same random numbers. With accumulation: only the last backward steps."""
    model, other = model_of(0.3), model_of(0.3)
    expected = usual(name, other, micro=micro, max_grad_norm=0.05)
    optimizer = distopt.create_optimizer(name, model, lr=1e-2, weight_decay=0.1, max_grad_norm=0.05)
    stepper = distopt.step_in_backward(model, optimizer, two_pass=True)
    for step in range(4):
        torch.manual_seed(step)
        for _ in stepper.passes():
            with stepper.accumulate():
                for part in range(micro - 1):
                    loss_of(model, 10 * step + part).backward()
            loss_of(model, 10 * step + micro - 1).backward()
        optimizer.step()
    assert stepper.last_grad_norm == pytest.approx(expected.last_grad_norm, rel=1e-6)
    for a, b in zip(weights(model), weights(other)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the norm is summed in another order


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_gradient_that_is_not_finite_is_found_before_anything_changes(nonfinite: str) -> None:
    model = model_of()
    optimizer = distopt.create_optimizer("adamw", model, lr=1e-2, nonfinite=nonfinite)
    stepper = distopt.step_in_backward(model, optimizer, two_pass=True)
    before = weights(model)

    def passes() -> list[int]:
        seen = []
        for number in stepper.passes():
            seen.append(number)
            (loss_of(model, 0) * torch.tensor(torch.inf)).backward()
        return seen

    if nonfinite == "raise":
        with pytest.raises(ValueError, match="nothing was changed"):
            passes()
    else:
        assert passes() == [0]
        assert stepper.skipped_steps == 1
        optimizer.step()  # the first one, and there is not a gradient
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)))


def build(name: str = "adamw", **options: Any) -> tuple[nn.Module, distopt.Optimizer]:
    model = model_of()
    return model, distopt.create_optimizer(name, model, lr=1e-2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "need all gradients before the first change"),
        ({"nonfinite": None, "max_grad_norm": 1.0}, "pass two_pass=True"),
        ({"name": "prodigy", "nonfinite": None}, "sums over all parameters"),
    ],
)
def test_what_cannot_be_exact_is_refused(options: dict[str, Any], message: str) -> None:
    model, optimizer = build(**options)
    with pytest.raises(ValueError, match=message):
        distopt.step_in_backward(model, optimizer)


def test_what_needs_a_closure_or_is_of_torch_is_refused() -> None:
    model = model_of()
    for optimizer in (distopt.LBFGS(model.parameters()), torch.optim.AdamW(model.parameters())):
        with pytest.raises(TypeError, match="cannot step in backward"):
            distopt.step_in_backward(model, optimizer)  # type: ignore[arg-type]


def test_a_schedule_comes_after_and_sets_every_lr() -> None:
    model, optimizer = build(**OFF)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="schedulers after"):
        distopt.step_in_backward(model, optimizer)
    model, optimizer = build(**OFF)
    distopt.step_in_backward(model, optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = weights(model)
    loss_of(model, 0).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)))


def test_a_grad_scaler_is_refused() -> None:
    model, optimizer = build(**OFF)
    distopt.step_in_backward(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(ValueError, match="GradScaler"):
        scaler.step(optimizer)


def test_training_goes_on_from_a_state_dict() -> None:
    model, optimizer = build(**OFF)
    distopt.step_in_backward(model, optimizer)
    loss_of(model, 0).backward()
    again, resumed = build(**OFF)
    again.load_state_dict(model.state_dict())
    distopt.step_in_backward(again, resumed)
    resumed.load_state_dict(optimizer.state_dict())
    for m in (model, again):
        loss_of(m, 1).backward()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again)))


def sharded(name: str, in_backward: bool) -> list[Tensor] | str:
    model = model_of()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = distopt.create_optimizer(name, model, lr=1e-2, weight_decay=0.1, nonfinite=None)
    if in_backward:
        try:
            distopt.step_in_backward(model, optimizer)
        except ValueError as refused:
            return str(refused)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def test_sharded_parameters_are_stepped_as_usual() -> None:
    run: Callable[..., list[Any]] = pool(2).run
    for found, expected in zip(run(f"{HERE}:sharded", "adamw", True), run(f"{HERE}:sharded", "adamw", False)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_rules_that_need_other_ranks_are_refused_on_sharded_parameters() -> None:
    for message in pool(2).run(f"{HERE}:sharded", "muon", True):
        assert "needs other ranks" in message
