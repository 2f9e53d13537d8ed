"""Adafactor against torch.optim.Adafactor, transformers' and the naive reference."""

import torch
import transformers

from tests.cases import Case, Options, Oracle, Package, public
from tests.references import adafactor


def for_transformers(options: Options) -> Options:
    """Transformers' class as torch's: no schedule of its own, a constant lr."""
    return options | {"relative_step": False}


CASE = Case(
    optimizer="Adafactor",
    torch_class=torch.optim.Adafactor,
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "large_steps": {"lr": 0.5, "beta2_decay": -0.6, "eps": (1e-6, 1e-2), "d": 1.5, "weight_decay": 0.1},
        "maximize": {"lr": 0.1, "maximize": True},
        "unscaled": {"lr": 0.01, "scale_parameter": False},
    },
    oracles=(
        Oracle(
            name="reference",
            run=adafactor,
            rel=5e-6,
            why="float32 rounding of weights that move by 1e-2 of themselves; torch's float32 is 3.5e-6 off",
        ),
        Package(
            name="torch",
            run=public(torch.optim.Adafactor),
            variants=("default", "large_steps", "maximize"),
            where=lambda shape, options: 0 not in shape,  # torch divides by the number of elements
            rel=2e-6,
            why="sums in another order",
        ),
        Package(
            name="transformers",
            run=public(transformers.optimization.Adafactor, for_transformers),
            variants=("unscaled",),
            where=lambda shape, options: 0 not in shape,
            rel=2e-6,
            why="sums in another order",
        ),
    ),
    sharded=1e-6,
    sharded_why="sums over ranks come in another order",
)
