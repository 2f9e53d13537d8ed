"""Low precision: updates that vanish are told of, and stochastic rounding goes on where it was."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
import distopt.checkpoint
from distopt.vanishing import EVERY


def train(model: nn.Module, built: Any, steps: range) -> list[str]:
    """What is warned of in some steps with fixed gradients."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            built.step()
    return [str(warning.message) for warning in caught if "updates" in str(warning.message)]


def linear(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32)).to(dtype)


def test_updates_of_bf16_weights_that_vanish_are_warned_of_once() -> None:
    model = linear()
    before = [param.detach().clone() for param in model.parameters()]
    built = distopt.create_optimizer("adamw", model, lr=1e-6)
    assert train(model, built, range(EVERY)) == []
    [said] = train(model, built, range(EVERY, 3 * EVERY + 2))
    assert "% of the updates of bfloat16 or float16 weights vanish" in said
    assert "master_codec='bits8'" in said
    unmoved = [param == old for param, old in zip(model.parameters(), before)]
    assert torch.cat([same.flatten() for same in unmoved]).float().mean() > 0.9, "and they do"


QUIET: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "steps that are large enough": lambda: built_of(linear(), lr=1e-2),
    "master bits": lambda: built_of(linear(), lr=1e-6, master_codec="bits8"),
    "fp32 weights": lambda: built_of(linear(torch.float32), lr=1e-6),
    "a learning rate of zero": lambda: built_of(linear(), lr=0.0),
}


def built_of(model: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    return model, distopt.create_optimizer("adamw", model, **options)


@pytest.mark.parametrize("case", QUIET)
def test_nothing_is_said_of(case: str) -> None:
    model, built = QUIET[case]()
    assert train(model, built, range(EVERY + 2)) == []


def test_rows_without_a_gradient_do_not_count_as_vanished() -> None:
    """An embedding moves where its tokens are."""
    model = nn.Embedding(64, 32).bfloat16()
    built = distopt.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(EVERY + 2):
            built.zero_grad()
            (model(torch.arange(3)) * torch.ones(32).bfloat16()).sum().backward()
            built.step()


@pytest.mark.parametrize("way", ["checkpoint", "state_dict"])
def test_stochastic_rounding_goes_on_bit_for_bit_after_a_resume(way: str, tmp_path: Path) -> None:
    """Its random bits depend on seed, step, state and element; seed and step are saved."""

    def build(seed: int) -> tuple[nn.Module, Any]:
        return built_of(linear(), lr=1e-2, state_codec="bf16_sr", master_codec="bits16", rounding_seed=seed)

    model, built = build(7)
    train(model, built, range(4))
    other, again = build(0)  # the seed comes from what is loaded
    if way == "checkpoint":
        distopt.checkpoint.save(tmp_path / "step", model=model, optimizer=built)
        distopt.checkpoint.load(tmp_path / "step", model=other, optimizer=again)
    else:
        other.load_state_dict(model.state_dict())
        again.load_state_dict(built.state_dict())
    train(model, built, range(4, 8))
    train(other, again, range(4, 8))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    states, others = (one.state_dict()["state"] for one in (built, again))
    assert all(torch.equal(states[i][key], others[i][key]) for i in states for key in states[i])

    third, reseeded = build(7)
    third.load_state_dict(other.state_dict())
    reseeded.load_state_dict(again.state_dict())
    for group in reseeded.param_groups:
        group["rounding_seed"] = 8
    train(other, again, range(8, 9))
    train(third, reseeded, range(8, 9))
    moments = [one.state_dict()["state"][0]["exp_avg"] for one in (again, reseeded)]
    assert not torch.equal(*moments), "the seed decides"


@pytest.mark.parametrize("master", ["none", "bits8", "fp32"])
def test_small_parameters_of_two_low_precisions_are_stepped_as_each_alone(master: str) -> None:
    """Both take 2 bytes, and their states could lie together."""
    dtypes = {"a": torch.bfloat16, "b": torch.float16, "c": torch.bfloat16}

    def stepped(names: list[str]) -> list[Tensor]:
        params = {}
        for name in names:
            torch.manual_seed(ord(name))
            params[name] = nn.Parameter(torch.randn(40, 64).to(dtypes[name]))
        built = distopt.Lion(params.items(), lr=1e-3, state_codec="int8", master_codec=master)
        for _ in range(4):
            for param in params.values():
                param.grad = param.detach().sin()
            built.step()
        return [param.detach() for param in params.values()] + [weight for _, weight in built._bind().master_weights()]

    together = stepped(list("abc"))
    alone = [stepped([name]) for name in "abc"]
    assert all(map(torch.equal, together, [tensor for tensors in zip(*alone) for tensor in tensors]))
