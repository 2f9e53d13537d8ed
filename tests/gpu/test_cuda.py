"""On a CUDA device every rule gives what it gives on the CPU, and a step leaves no tensor on the host."""

import pytest
import torch
from torch import nn

import distopt
from distopt.rules import RULES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = {"tall": (300, 40), "wide": (24, 200), "row": (1, 64), "vector": (130,), "experts": (3, 40, 24)}


def trained(rule: str, device: str) -> dict[str, torch.Tensor]:
    """Weights after five steps on fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    cls = getattr(distopt, RULES[rule])
    params = {}
    for name, shape in SHAPES.items():
        if name != "vector" or rule in ("sgd", "adamw", "lion", "adafactor", "soap"):
            params[name] = nn.Parameter(torch.randn(shape, generator=generator).to(device))
    options = {"ns_dtype": torch.float32} if rule == "muon" else {}
    optimizer = cls(params.items(), lr=1e-2, **options)
    for _ in range(5):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.step()
    assert all(
        tensor.device.type == torch.device(device).type
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    return {name: param.detach().cpu() for name, param in params.items()}


@pytest.mark.parametrize("rule", ["sgd", "adamw", "lion", "adafactor", "muon"])
def test_a_rule_on_cuda_equals_the_rule_on_cpu(rule: str) -> None:
    there, here = trained(rule, "cuda"), trained(rule, "cpu")
    for name, weight in here.items():
        assert (there[name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_soap_on_cuda_is_finite_and_moves() -> None:
    weights = trained("soap", "cuda")
    assert all(weight.isfinite().all() for weight in weights.values())
