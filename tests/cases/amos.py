"""Amos against pytorch_optimizer's and the naive reference."""

import pytorch_optimizer

from tests.cases import Case, Oracle, Package, public
from tests.references.amos import amos

CASE = Case(
    optimizer="Amos",
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "momentum": {"lr": 0.1, "beta": 0.95, "momentum": 0.9, "extra_l2": 0.01},
    },
    oracles=(
        Oracle(name="reference", run=amos, rel=1e-5, why="float32 rounding of the weights, 4e-6 measured"),
        Package(
            name="pytorch_optimizer",
            run=public(pytorch_optimizer.Amos),
            where=lambda shape, options: 0 not in shape and len(shape) < 3,
            rel=2e-6,
            why="sums in another order",
        ),
    ),
    sharded=1e-6,
    sharded_why="sums over ranks come in another order",
)
