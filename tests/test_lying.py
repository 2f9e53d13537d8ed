"""Weights and gradients that are found natively: what is stepped is what is stepped without, and what changed is seen."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.kernels import native
from distopt.state.lying import MANY, Lying

pytestmark = pytest.mark.skipif(native.build_many() is None, reason="needs a C++ compiler")

KINDS = {
    "fp32": (torch.float32, {}),
    "clipped": (torch.float32, {"max_grad_norm": 0.5, "nonfinite": None}),
    "int8": (torch.float32, {"state_codec": "int8"}),
    "int8 turned around": (torch.float32, {"state_codec": "int8", "maximize": True, "max_grad_norm": 0.5}),
    "bf16": (torch.bfloat16, {"state_codec": "int8", "master_codec": "bits8", "max_grad_norm": 0.5}),
    "text": (torch.float32, {"amsgrad": True}),
}


def trained(kind: str) -> tuple[list[Tensor], list[bool]]:
    """Weights and states after steps of which one lacks a gradient, and one has a strided one; whether they were found."""
    dtype, options = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    shapes = [(2048,), (3, 700), (1,), (0,), (1, 5), (5, 1)] * (MANY // 4)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    built = distopt.AdamW([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, **options)
    found = []
    for number in range(5):
        for i, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator).to(dtype)
            strided = number == 3 and i == 7
            param.grad = None if number == 1 and i == 8 else grad.t().contiguous().t() if strided else grad
        built.step()
        group = built._bound.groups[0]
        found.append(group.lying is not None and group.lying.find([param.grad for param in params]))
    states = [value for entry in built.state_dict()["state"].values() for value in entry.values()]
    return [param.detach() for param in params] + states, found


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_as_one_that_asks_every_parameter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected_found = [True, False, True, False, True]
    mine, found = trained(kind)
    assert found == expected_found
    monkeypatch.setattr("distopt.elementwise.make_lying", lambda windows: None)
    other, found = trained(kind)
    assert not any(found)
    exact = "max_grad_norm" not in KINDS[kind][1]  # the norm is added up in another order
    for a, b in zip(mine, other, strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-6)


def test_what_is_not_as_it_was_is_not_found() -> None:
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(MANY)]
    for param in params:
        param.grad = torch.randn(4, 6)
    built = distopt.AdamW([(f"p{i}", p) for i, p in enumerate(params)])
    lying = built._bind().groups[0].lying
    assert isinstance(lying, Lying)
    grads = [param.grad for param in params]
    assert lying.find(grads)
    assert lying.weights.tolist() == [param.data_ptr() for param in params]
    assert lying.grads.tolist() == [grad.data_ptr() for grad in grads]
    freed = torch.randn(4, 6)
    freed.untyped_storage().resize_(0)
    others = [
        None,
        freed,
        torch.randn(4, 5),
        torch.randn(6, 4).t(),
        torch.randn(1, 6).expand(4, 6),
        torch.randn(4, 6).double(),
        torch.randn(4, 6).to_sparse(),
        torch.randn(4, 6, device="meta"),
    ]
    for other in others:
        assert not lying.find([*grads[:-1], other])
    assert lying.find([*grads[:-1], torch.randn(24).view(4, 6)])
    params[3].data = torch.randn(6, 4).t()
    assert not lying.find(grads)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}])
@pytest.mark.parametrize("count", [MANY, 3])
def test_a_gradient_whose_sign_is_not_in_memory_is_read_with_it(options: dict[str, Any], count: int) -> None:
    ran = []
    for copies in (False, True):
        params = [nn.Parameter(torch.full(shape, 2.0)) for shape in [(3,), (1, 1), ()] * count]
        built = distopt.AdamW([(f"p{i}", p) for i, p in enumerate(params)], lr=0.1, **options)
        for _ in range(2):
            for param in params:
                z = torch.complex(torch.ones_like(param), param).conj()
                param.grad = None
                (z * (1 + 2j)).imag.sum().backward()  # type: ignore[no-untyped-call]
                assert param.grad is not None
                assert param.grad.is_neg() == (param.numel() == 1)
                param.grad = param.grad.resolve_neg() if copies else param.grad
            built.step()
        ran.append([param.detach() for param in params])
    assert all(map(torch.equal, *ran))


@pytest.mark.parametrize("count", [MANY, 3])
@pytest.mark.parametrize("options", [{}, {"nonfinite": None}])
def test_coded_parameters_without_memory_are_refused(options: dict[str, Any], count: int) -> None:
    params = [nn.Parameter(torch.randn(4, 600)) for _ in range(count)]
    built = distopt.AdamW([(f"p{i}", p) for i, p in enumerate(params)], state_codec="int8", **options)
    for param in params:
        param.grad = torch.randn(4, 600)
    built.step()
    kept, grad = params[0].detach().clone(), params[1].grad
    assert grad is not None
    grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="the gradient of 'p1' has no memory"):
        built.step()
    params[1].grad = torch.randn(4, 600)
    params[2].data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="'p2' has no memory"):
        built.step()
    assert torch.equal(params[0], kept)
