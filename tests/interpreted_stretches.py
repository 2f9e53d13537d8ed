"""Stretches of rules by Triton kernels, beside the functions that they stand for; run by interpreted.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import distopt
from distopt import bucket
from distopt.kernels import triton_stretches
from distopt.rules import adafactor, muon

WHOLE = (2, 19, 150)


def stacks(generator: torch.Generator) -> list[Callable[[], Tensor]]:
    """Makers of stacks of one shape that lie as the engine's do: alone, in a wider tensor, transposed."""
    k, rows, cols = WHOLE
    return [
        lambda: torch.randn(WHOLE, generator=generator),
        lambda: torch.randn((rows, 4 * cols), generator=generator).as_strided(WHOLE, (2 * cols, 4 * cols, 1)),
        lambda: torch.randn((k, cols, rows), generator=generator).mT,
    ]


def compare() -> None:
    """Every stretch, over stacks of all kinds and in every dtype that travels."""
    generator = torch.Generator().manual_seed(0)
    row, col, one = (
        torch.rand((WHOLE[0], *shape), generator=generator) for shape in ((WHOLE[1], 1), (1, WHOLE[2]), (1, 1))
    )
    col[:, :, :9] = 0  # columns without a gradient
    for make in stacks(generator):
        x, y = make(), stacks(generator)[0]()
        near(adafactor.precondition, x, row, col, one, 1e-7)
        near(adafactor.average, x, y.square(), 0.3, 1e-7)
        near(adafactor.average, x, y.square(), 1.0, 1e-7)
        near(adafactor.apply, x, y, one, 0.9)
        for dtype in triton_stretches.SERVED:
            near(muon.prepare, x, y, 0.95, True, dtype)
            near(muon.prepare, x, y, 0.3, False, dtype)
            near(muon.apply, x, make().to(dtype), 0.99, -0.02)
    flat = torch.randn((1, 1, 5000), generator=generator)
    near(muon.prepare, flat, flat.flip(-1), 0.95, True, torch.bfloat16)
    broken = x.masked_fill(torch.rand(WHOLE, generator=generator) < 0.1, torch.nan)
    near(adafactor.precondition, x, row, broken[:, :1], one, 1e-7)
    launch, launched = triton_stretches.launch, []
    triton_stretches.launch = lambda *args: launched.append(args)
    try:
        for given, dtype in ((x[:0], torch.float32), (x, torch.float64)):
            assert triton_stretches.KERNELS[muon.prepare](given, given, 0.9, True, dtype)[1].dtype == dtype
        assert not launched, "the text runs"
    finally:
        triton_stretches.launch = launch


def near(text: Callable[..., Any], *args: Any) -> None:
    """The kernel gives what the text does, up to the last bits."""
    found, expected = triton_stretches.KERNELS[text](*args), text(*args)
    if isinstance(expected, Tensor):
        found, expected = [found], [expected]
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype
        ulp = torch.finfo(one.dtype).eps
        far = (one.double() - other.double()).abs() > max(ulp, 1e-6) * (other.double().abs() + 1)
        assert not far.any(), (text, one.dtype)
        assert torch.equal(one.isnan(), other.isnan())
        assert ulp < 1e-6 or one.ne(other).float().mean() <= 1e-3, "the same rounding"


def optimize(rule: str, options: dict[str, Any], calls: int) -> None:
    """Steps with kernels, beside steps by the text; some parameters are one stack, one is a stack by itself."""
    shapes = {"wide": (24, 200), "stack": (3, 40, 24), "other": (24, 200), "vector": (130,)}

    def trained(kernels: Any) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        bucket.stretch_kernels = lambda device: kernels
        params = {
            name: nn.Parameter(torch.randn(shape, generator=generator))
            for name, shape in shapes.items()
            if name != "vector" or rule == "Adafactor"
        }
        built = getattr(distopt, rule)(params.items(), lr=1e-2, **options)
        for _ in range(3):
            for param in params.values():
                param.grad = torch.randn(param.shape, generator=generator)
            built.step()
        states = [value for state in built.state_dict()["state"].values() for value in state.values()]
        return list(params.values()), states

    launched, before = [], bucket.stretch_kernels
    counted = {
        text: lambda *args, kernel=kernel: launched.append(kernel) or kernel(*args)
        for text, kernel in triton_stretches.KERNELS.items()
    }
    try:
        mine, expected = trained(counted), trained({})
    finally:
        bucket.stretch_kernels = before
    assert len(launched) == calls, (rule, len(launched))
    for one, other in zip([*mine[0], *mine[1]], [*expected[0], *expected[1]]):
        assert (one - other).norm() <= 1e-5 * other.norm(), rule


def main() -> None:
    """All of it."""
    compare()
    optimize("Muon", {"ns_dtype": torch.float32}, calls=3 * 2 * 2)
    optimize("NorMuon", {"ns_dtype": torch.float32, "nesterov": True}, calls=3 * 2 * 2)
    optimize("Adafactor", {}, calls=3 * 3 * 2)
