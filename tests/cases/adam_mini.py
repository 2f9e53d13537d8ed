"""Adam-mini against adam_mini and the naive reference."""

from typing import Any

import torch
from adam_mini import Adam_mini  # type: ignore[import-untyped]

from tests.cases import Case, Oracle, Package, public
from tests.references.adam_mini import adam_mini


def named(params: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """It decides by names: per row in an MLP, one block for what it does not know."""
    named_parameters = [("mlp.weight" if param.ndim > 1 else "scale", param) for param in params]
    return Adam_mini(named_parameters, dim=8, n_heads=1, verbose=False, **options)


CASE = Case(
    optimizer="AdamMini",
    ndims=frozenset({0, 1, 2, 3}),
    variants={"default": {}, "decay": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}},
    oracles=(
        Oracle(name="reference", run=adam_mini, rel=2e-6, why="float32 rounding of the weights, 7e-7 measured"),
        # It takes matrices and vectors.
        Package(
            name="package",
            run=public(named),
            where=lambda shape, _: 0 not in shape and len(shape) < 3,
            rel=2e-6,
            why="order of sums",
        ),
    ),
    sharded=1e-6,
    sharded_why="sums over ranks come in another order",
)
