"""APOLLO-Mini: APOLLO with the authors' setting."""

from dataclasses import replace
from typing import Any

import torch

from tests.cases import Case, Oracle
from tests.cases import apollo as base
from tests.references.apollo import apollo

MINI: dict[str, Any] = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}
public = base.CASE.oracles[1]


def package(weight: torch.Tensor, grads: list[torch.Tensor], **options: Any) -> torch.Tensor:
    """The package with that setting."""
    return base.package(weight, grads, **{**MINI, **options})


CASE = Case(
    optimizer="APOLLOMini",
    ndims=base.CASE.ndims,
    variants={"default": {}, "often": {"lr": 0.01, "update_proj_gap": 2, "weight_decay": 0.1, "scale": 16.0}},
    oracles=(
        Oracle(
            name="reference",
            run=lambda weight, grads, **options: apollo(weight, grads, **{**MINI, **options}),
            rel=1e-5,
            why=base.CASE.oracles[0].why,
        ),
        replace(public, run=package, variants=None),
    ),
    sharded=base.CASE.sharded,
    sharded_stacks=base.CASE.sharded_stacks,
    sharded_why=base.CASE.sharded_why,
)
