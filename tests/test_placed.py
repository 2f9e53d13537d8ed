"""Many fp32 parameters, stepped where they are by one compiled call."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.kernels import native
from distopt.state import placed

pytestmark = pytest.mark.skipif(native.build("Lion", ("Fp32",)) is None, reason="needs a C++ compiler")

SHAPES = [(7,), (3, 5), (1,), (0,), (130,), (16, 8), (2, 3, 4), (5000,), (300, 401)] * 8
RULES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"max_grad_norm": 0.5, "maximize": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Lion", {"weight_decay": 0.1}),
]


def trained(rule: str, options: dict[str, Any], *, steps: int = 5, odd: bool = True) -> tuple[list[Tensor], Any]:
    """Weights and states after some steps in which gradients are missing, strided, or of a channels_last weight."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    if odd:
        params.append(
            nn.Parameter(torch.randn((4, 3, 2, 2), generator=generator).to(memory_format=torch.channels_last))
        )
    built = getattr(distopt, rule)([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, **options)
    for number in range(steps):
        for i, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator) * 10.0 ** (i % 5 - 3)
            if odd and i % 7 == 2 and grad.ndim == 2:
                grad = grad.t().contiguous().t()
            param.grad = None if odd and number == 2 and i % 9 == 4 else grad
        built.step()
    states = [built.state[param][name] for param in params for name in built.state[param] if name != "step"]
    return [param.detach() for param in params] + states, built


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_the_bits_are_those_of_the_steps_that_need_no_compiler(
    rule: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, built = trained(rule, options)
    assert built._bound.groups[0].placed is not None
    monkeypatch.setattr("distopt.elementwise.MANY", 10**9)
    expected, other = trained(rule, options)
    assert other._bound.groups[0].placed is None
    if "max_grad_norm" in options:  # the norm is added up in another order
        assert built.last_grad_norm == pytest.approx(other.last_grad_norm, rel=1e-6)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(found, expected))
    else:
        assert all(map(torch.equal, found, expected))


def test_as_torchs_own_over_steps() -> None:
    found, _ = trained("AdamW", {"nonfinite": None}, odd=False)
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    torchs = torch.optim.AdamW(params, lr=1e-2, fused=True)
    for _ in range(5):
        for i, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** (i % 5 - 3)
        torchs.step()
    for mine, other in zip(found, params):
        assert torch.equal(
            mine.view(-1)[: mine.numel() // 16 * 16], other.detach().view(-1)[: other.numel() // 16 * 16]
        )
        assert torch.allclose(mine, other.detach(), rtol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    for bad in (float("nan"), float("inf")):
        found, built = trained("AdamW", {}, odd=False)
        before = [tensor.clone() for tensor in found]
        built.param_groups[0]["params"][-1].grad.view(-1)[-1] = bad
        with pytest.raises(ValueError, match=f"the gradient of 'p{len(SHAPES) - 1}' is not finite"):
            built.step()
        assert all(map(torch.equal, found, before))


def test_large_and_small_gradients_have_an_exact_norm() -> None:
    for scale in (1e25, 1e-25):
        params = [nn.Parameter(torch.zeros(100)) for _ in range(placed.MANY)]
        built = distopt.AdamW([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-3)
        for param in params:
            param.grad = torch.full((100,), scale)
        built.step()
        assert built.last_grad_norm == pytest.approx(scale * (100 * placed.MANY) ** 0.5, rel=1e-6)


def test_a_parameter_whose_storage_was_exchanged_is_refused_before_anything_changes() -> None:
    _, built = trained("AdamW", {}, odd=False)
    first, last = built.param_groups[0]["params"][0], built.param_groups[0]["params"][-1]
    before = first.detach().clone()
    last.data = torch.zeros(3)
    last.grad = torch.zeros(3)
    with pytest.raises(ValueError, match="had 120300 elements on cpu here when the optimizer was bound, and has 3"):
        built.step()
    assert torch.equal(first.detach(), before)
    last.data = torch.ones(300, 401)  # the same size again, elsewhere
    last.grad = torch.ones(300, 401)
    built.step()
    assert not torch.equal(first.detach(), before) and bool((last != 1).all())
