"""optimizer.observe: what is refused, what waits, and what small, missing and encoded parameters make of it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt


def sophia(shapes: dict[str, tuple[int, ...]], **options: Any) -> tuple[distopt.Optimizer, dict[str, nn.Parameter]]:
    params = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    return distopt.SophiaG(params.items(), **options), params


def fill(params: dict[str, nn.Parameter], value: float) -> None:
    for param in params.values():
        param.grad = torch.full_like(param, value)


def hessian(optimizer: distopt.Optimizer, param: Tensor) -> Tensor:
    [place] = [i for i, known in enumerate(optimizer.state) if known is param]
    return optimizer.state_dict()["state"][place]["hessian"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nonfinite_observation_is_refused_and_nothing_changes(value: float) -> None:
    optimizer, params = sophia({"a": (3, 4), "b": (200, 100)})
    fill(params, 2.0)
    assert optimizer.observe("hessian")
    before = [hessian(optimizer, param).clone() for param in params.values()]
    assert all(part.mean().item() == pytest.approx(0.04) for part in before)
    params["b"].grad[5, 5] = value
    with pytest.raises(ValueError, match="observation of 'hessian' is not finite"):
        optimizer.observe("hessian")
    assert all(torch.equal(hessian(optimizer, p), old) for p, old in zip(params.values(), before))


def test_a_nonfinite_observation_is_skipped_where_steps_are() -> None:
    optimizer, params = sophia({"a": (3, 4)}, nonfinite="skip")
    fill(params, torch.inf)
    assert not optimizer.observe("hessian")
    assert not hessian(optimizer, params["a"]).any()


@pytest.mark.parametrize("size", [5, 20_000])
def test_parameters_without_a_gradient_keep_what_they_have_seen(size: int) -> None:
    optimizer, params = sophia({"seen": (size,), "unseen": (size,)})
    fill(params, 1.0)
    optimizer.observe("hessian")
    before = hessian(optimizer, params["unseen"]).clone()
    params["unseen"].grad = None
    optimizer.observe("hessian")
    assert torch.equal(hessian(optimizer, params["unseen"]), before)
    assert (hessian(optimizer, params["seen"]) > before).all()


def test_weights_and_steps_do_not_move_by_observing() -> None:
    optimizer, params = sophia({"a": (3, 4), "b": (200, 100)})
    fill(params, 1.0)
    optimizer.observe("hessian")
    assert all(torch.equal(param, torch.ones_like(param)) for param in params.values())
    assert optimizer.state_dict()["state"][0]["step"] == 0


def test_an_observation_only_reaches_the_groups_whose_rule_takes_it() -> None:
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = distopt.SophiaG([{"params": [first]}, {"params": [second], "rule": "adamw"}])
    first.grad, second.grad = torch.ones(4), torch.full((4,), torch.nan)  # not looked at
    assert optimizer.observe("hessian")
    assert hessian(optimizer, first).all()


def test_codes_take_observations_as_fp32_does() -> None:
    found = {}
    for codec in ("fp32", "int8"):
        optimizer, params = sophia({"a": (300, 100), "b": (7, 9)}, state_codec=codec, bs=1.0)
        for seed in range(3):
            for param in params.values():
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.observe("hessian")
            optimizer.step()
        found[codec] = hessian(optimizer, params["a"])
    error = (found["int8"] - found["fp32"]).norm() / found["fp32"].norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("hessian", None, r"no rule here observes 'hessian'; what can be observed: \['max_logit'\]"),
        ("max_logit", {}, "nothing to observe"),
        ("max_logit", {"k": torch.ones(2)}, "'k', which is no parameter"),
        ("max_logit", {"q": torch.ones(5)}, r"'q' has 8 rows, 'max_logit' for it has shape \(5,\)"),
        ("max_logit", {"q": torch.ones(2, 2)}, "give one number for each of equal blocks"),
        ("max_logit", {"q": torch.tensor([1.0, torch.nan])}, "not finite"),
    ],
)
def test_wrong_observations_are_named(name: str, values: Any, message: str) -> None:
    optimizer = distopt.MuonClip([("q", nn.Parameter(torch.ones(8, 4)))])
    with pytest.raises(ValueError, match=message):
        optimizer.observe(name, values)


def test_values_are_refused_where_gradients_are_read() -> None:
    optimizer, params = sophia({"a": (3, 4)})
    fill(params, 1.0)
    with pytest.raises(ValueError, match=r"read from \.grad"):
        optimizer.observe("hessian", {"a": torch.ones(3)})


def test_logits_are_clipped_once_by_the_largest_of_a_step() -> None:
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    clipped, plain = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    clip, muon = distopt.MuonClip([("q", clipped)], tau=100.0), distopt.Muon([("q", plain)])
    for step in range(2):
        clipped.grad, plain.grad = torch.ones(8, 4), torch.ones(8, 4)
        if step == 0:
            clip.observe("max_logit", {"q": torch.tensor([400.0, 50.0])})
            clip.observe("max_logit", {clipped: torch.tensor([25.0, 99.0])})
        before = clipped.detach().clone()
        clip.step()
        muon.step()
        if step == 0:
            assert torch.allclose(clipped[:4], plain[:4] / 2)
            assert torch.equal(clipped[4:], plain[4:])
    change = (clipped - before).abs().max().item()  # the second step was not observed
    assert 0 < change < 0.1
