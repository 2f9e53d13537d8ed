"""Optimizers that page, and their training, for the tests of what they do and of what goes wrong."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import distopt
from tests.cases import Case, show

SMALL = {"matrix": (36, 40), "vector": (1500,), "few": (10,)}
# Several pages, rows that are no whole tiles, small ones that share a page, less than what is paged.
MIXED = {"large": (200, 700), "wide": (64, 256), "odd": (37, 100), "vector": (5000,), "narrow": (600, 3), "few": (10,)}
Params = dict[str, nn.Parameter]


def build(
    optimizer: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Params, Any]:
    generator = torch.Generator().manual_seed(0)
    params = {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}
    return params, getattr(distopt, optimizer)(params.items(), **options)


def train(params: Params, built: Any, steps: range, case: Case | None = None, *, gaps: bool = True) -> None:
    """Some steps; now and then a gradient is missing, unless there are to be no `gaps`."""
    for step in steps:
        if case is not None and case.observes and step % 3 == 0:
            show(built, case.observes, params, step)
        generator = torch.Generator().manual_seed(step)
        for number, param in enumerate(params.values()):
            noise, spread = (torch.randn(param.shape, generator=generator) for _ in range(2))
            param.grad = (noise * spread.exp()).to(param.dtype) if not gaps or (number + step) % 7 != 3 else None
        built.step()


def differing(one: tuple[Params, Any], other: tuple[Params, Any]) -> list[Any]:
    """Weights and states that are not the same, bit for bit."""
    wrong: list[Any] = [name for name, param in one[0].items() if not torch.equal(param, other[0][name])]
    mine, theirs = one[1].state_dict()["state"], other[1].state_dict()["state"]
    assert [set(entry) for entry in mine.values()] == [set(entry) for entry in theirs.values()]
    return wrong + [(i, k) for i in mine for k in mine[i] if not torch.equal(mine[i][k], theirs[i][k])]
